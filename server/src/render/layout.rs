//! Colour, columns and wrapped lines.

/// Columns that text is wrapped at.
const WIDTH: usize = 100;

/// How text is dressed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Whether colours are used (ECMA-48 sequences).
    pub colour: bool,
}

impl Style {
    fn dress(self, code: &str, text: &str) -> String {
        if self.colour && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(super) fn bold(self, text: &str) -> String {
        self.dress("1", text)
    }

    pub(super) fn dim(self, text: &str) -> String {
        self.dress("2", text)
    }

    pub(super) fn good(self, text: &str) -> String {
        self.dress("32", text)
    }

    pub(super) fn bad(self, text: &str) -> String {
        self.dress("1;31", text)
    }

    pub(super) fn severity(self, severity: &str, text: &str) -> String {
        let code = match severity {
            "critical" => "1;97;41",
            "high" => "1;31",
            "medium" => "33",
            "low" => "36",
            _ => "2",
        };
        self.dress(code, text)
    }
}

/// Text of a message without anything that a terminal would act on.
pub fn clean(text: &str) -> String {
    let visible = |c: char| {
        // Beyond control characters: what turns the direction of writing around can disguise a name.
        let is_direction = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || is_direction { '\u{fffd}' } else { c }
    };
    text.chars().map(visible).collect()
}

/// The same of a text of several lines.
pub fn clean_lines(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(clean).collect();
    lines.join("\n")
}

/// `text` in lines of at most [`WIDTH`] columns, the first behind `first`, the others behind as many blanks.
pub(super) fn wrap(first: &str, text: &str) -> String {
    let indent = " ".repeat(first.chars().count());
    let mut out = first.to_owned();
    let mut column = indent.len();
    for (index, word) in text.split_whitespace().enumerate() {
        let length = word.chars().count();
        if index > 0 {
            if column + 1 + length > WIDTH {
                out.push('\n');
                out.push_str(&indent);
                column = indent.len();
            } else {
                out.push(' ');
                column += 1;
            }
        }
        out.push_str(word);
        column += length;
    }
    out.push('\n');
    out
}

/// Columns under headings; those that `is_right` names are aligned to the right.
pub fn table(style: Style, headings: &[&str], is_right: &[bool], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).chain([headings[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..headings.len()).map(width).collect();
    let line = |cells: &[String]| {
        let mut text = String::from(" ");
        for (column, cell) in cells.iter().enumerate() {
            let pad = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
            if is_right[column] {
                text.push_str(&format!(" {pad}{cell}"));
            } else {
                text.push_str(&format!(" {cell}{pad}"));
            }
        }
        text.trim_end().to_owned() + "\n"
    };
    let headings: Vec<_> = headings.iter().map(|&heading| heading.to_owned()).collect();
    let mut out = style.dim(line(&headings).trim_end()) + "\n";
    for row in rows {
        out.push_str(&line(row));
    }
    out
}
