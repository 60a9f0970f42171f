//! Colour, columns and wrapped lines. A width is that of a terminal, where some characters take two columns and some none.

use unicode_width::UnicodeWidthStr;

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
        // What nobody sees may speak to a program that reads along.
        let is_invisible =
            matches!(c, '\u{200b}'..='\u{200f}' | '\u{2060}'..='\u{2064}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}');
        if c.is_control() || is_direction || is_invisible { '\u{fffd}' } else { c }
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
    let indent = " ".repeat(first.width());
    let mut out = first.to_owned();
    let mut column = indent.len();
    for (index, word) in text.split_whitespace().enumerate() {
        let length = word.width();
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

/// `text`, followed by blanks up to a number of columns.
pub fn padded(text: &str, columns: usize) -> String {
    text.to_owned() + &" ".repeat(columns.saturating_sub(text.width()))
}

/// Columns under headings; those that `is_right` names are aligned to the right.
pub fn table(style: Style, headings: &[&str], is_right: &[bool], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.width()).chain([headings[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..headings.len()).map(width).collect();
    let line = |cells: &[String]| {
        let mut text = String::from(" ");
        for (column, cell) in cells.iter().enumerate() {
            text.push(' ');
            if is_right[column] {
                text.push_str(&" ".repeat(widths[column].saturating_sub(cell.width())));
                text.push_str(cell);
            } else {
                text.push_str(&padded(cell, widths[column]));
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

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Style = Style { colour: false };

    /// Column at which the last word of each line begins.
    fn last_columns(text: &str) -> Vec<usize> {
        let before = |line: &str| line[..line.rfind(' ').map_or(0, |at| at + 1)].width();
        text.lines().map(before).collect()
    }

    #[test]
    fn wide_and_combining_characters_do_not_shift_the_next_column() {
        let rows = ["日本語-0", "web-0", "e\u{301}te\u{301}"].map(|name| vec![name.to_owned(), "Running".to_owned()]);
        let text = table(PLAIN, &["POD", "STATE"], &[false, false], &rows);
        assert_eq!(last_columns(&text), [11; 4], "{text}");
        let right = table(PLAIN, &["POD", "STATE"], &[true, false], &rows);
        assert_eq!(last_columns(&right), [11; 4], "{right}");
    }

    #[test]
    fn wrapped_lines_of_wide_characters_fit_the_width() {
        let text = wrap("  日本 ", &"日本語 ".repeat(40));
        assert!(text.lines().count() > 2 && text.lines().all(|line| line.width() <= WIDTH), "{text}");
        assert!(text.lines().skip(1).all(|line| line.starts_with(&(" ".repeat(7) + "日"))), "{text}");
    }
}
