//! Redaction of a process's arguments.
//!
//! What enters: arguments as the process has them, and names of what is secret. What leaves: one line of text. What
//! must hold: the value of a key that matches a name never leaves, however it is attached to the key. Where that is not
//! certain, more is taken out rather than less. A secret without a name (`mysql -pSECRET`) cannot be recognised, so
//! arguments are off by default.

use tapio_wire::program::glob;

/// What stands in a value's place.
const REDACTED: &str = "[redacted]";

/// Names that are always secret; a `*` stands for anything. `-` and `_` are the same, and so are small and capital letters.
const SECRET: &[&str] = &[
    "*password*",
    "*passwd*",
    "*passphrase*",
    "pass",
    "pwd",
    "*token*",
    "*secret*",
    "*credential*",
    "*authorization*",
    "*apikey*",
    "*api-key*",
    "*access-key*",
    "*private-key*",
    "*cookie*",
    "*session-id*",
];

/// Knows what is secret.
#[derive(Clone, Debug)]
pub struct Redactor {
    patterns: Vec<String>,
}

impl Default for Redactor {
    fn default() -> Self {
        Self::new(&[])
    }
}

impl Redactor {
    /// Makes a redactor that knows these names besides those that are always secret.
    pub fn new(names: &[String]) -> Self {
        let names = SECRET.iter().copied().chain(names.iter().map(String::as_str));
        Self { patterns: names.map(normal).collect() }
    }

    /// The arguments, each of which ends with a NUL, as one line without what is secret.
    pub fn line(&self, arguments: &[u8]) -> String {
        let arguments = arguments.strip_suffix(&[0]).unwrap_or(arguments);
        let mut line = String::with_capacity(arguments.len());
        let mut is_value = false;
        for argument in arguments.split(|&byte| byte == 0) {
            let argument = String::from_utf8_lossy(argument);
            let mut is_rest = false;
            // A shell gets a whole command as one argument.
            for word in argument.split_whitespace() {
                if is_rest {
                    break;
                }
                if !line.is_empty() {
                    line.push(' ');
                }
                if is_value {
                    line.push_str(REDACTED);
                    is_value = false;
                } else {
                    (is_value, is_rest) = self.word(word, &mut line);
                }
            }
            if is_rest {
                is_value = false;
            }
        }
        line
    }

    /// A line that a program wrote, without secrets. It is cut at the first value of a secret's key, since the quoting
    /// is unknown.
    pub fn text(&self, line: &str) -> String {
        let mut kept = line;
        let is_part = |at: char| at.is_alphanumeric() || matches!(at, '-' | '_' | '.');
        let mut from = 0;
        while let Some(begin) = line[from..].find(is_part).map(|at| from + at) {
            let end = line[begin..].find(|at| !is_part(at)).map_or(line.len(), |at| begin + at);
            let after = line[end..].trim_start_matches(['"', '\'', '\\', ']', ' ']);
            let is_key = after.starts_with([':', '=']) && self.is_secret(&line[begin..end]);
            let scheme = line[begin..end].to_lowercase();
            if is_key || matches!(&*scheme, "bearer" | "basic") && line[end..].starts_with(' ') {
                kept = &line[..end];
                break;
            }
            from = end;
        }
        let mut redacted = String::with_capacity(kept.len());
        let mut rest = kept;
        // `scheme://user:password@host`, also where the line ends before the host.
        while let Some(at) = rest.find("://") {
            let (before, after) = rest.split_at(at + 3);
            redacted.push_str(before);
            let end =
                after.find(|at: char| at.is_whitespace() || matches!(at, '/' | '"' | '\'')).unwrap_or(after.len());
            let has_user = after[..end].contains('@');
            let user = after[..end].rfind('@').filter(|_| has_user);
            if user.is_some() {
                redacted.push_str(REDACTED);
            }
            rest = &after[user.unwrap_or(0)..];
        }
        redacted.push_str(rest);
        if kept.len() < line.len() {
            redacted.push(' ');
            redacted.push_str(REDACTED);
        }
        redacted
    }

    /// Appends one word. Returns whether the next word is its value, and whether the rest of the argument is.
    fn word(&self, word: &str, line: &mut String) -> (bool, bool) {
        if let Some((scheme, rest)) = word.split_once("://") {
            let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
            if let Some((user, _)) = authority.rsplit_once('@') {
                // Only what is between "//" and "@" is secret, unless the word goes on with a key.
                self.pairs(&format!("{scheme}://{REDACTED}{}", &rest[user.len()..]), line);
                return (false, false);
            }
        }
        let ends_key = |at: char| at == '=' || at == ':';
        match word.find(ends_key) {
            Some(at) if self.is_secret(&word[..at]) => {
                let is_header = word[at..].starts_with(':');
                line.push_str(&word[..=at]);
                line.push_str(REDACTED);
                // `Authorization: Bearer …` and `KEY= …`: what follows is the value, of as many words as it may have.
                (false, is_header || word.len() == at + 1)
            }
            Some(_) => {
                self.pairs(word, line);
                // `--header=Authorization: Bearer …`
                let mut keys = word.split(['=', ':', '?', '&', ',', ';', '{', '}']);
                (false, word.ends_with(ends_key) && keys.any(|key| self.is_secret(key)))
            }
            None => {
                line.push_str(word);
                let is_option = word.starts_with('-') && word.len() > 1;
                (is_option && self.is_secret(word), false)
            }
        }
    }

    /// Appends a word in which there may be keys and values between `?`, `&`, `,`, `;` and quotes.
    fn pairs(&self, word: &str, line: &mut String) {
        let mut rest = word;
        while !rest.is_empty() {
            let end = rest.find(['?', '&', ',', ';', '\'', '"', '{', '}']).unwrap_or(rest.len());
            let (pair, after) = rest.split_at(end);
            match pair.find(['=', ':']) {
                Some(at) if pair.split(['=', ':']).any(|key| self.is_secret(key)) => {
                    line.push_str(&pair[..=at]);
                    line.push_str(REDACTED);
                    // A quoted value, or one with commas, goes on behind what ends a pair.
                    return;
                }
                _ if self.is_secret(pair) && after.len() > 1 => {
                    line.push_str(pair);
                    line.push_str(REDACTED);
                    return;
                }
                _ => line.push_str(pair),
            }
            let next = after.chars().next().map_or(0, char::len_utf8);
            line.push_str(&after[..next]);
            rest = &after[next..];
        }
    }

    fn is_secret(&self, key: &str) -> bool {
        let key = normal(key.trim_start_matches(['-', '"', '\'']).trim_end_matches(['"', '\'']));
        !key.is_empty() && self.patterns.iter().any(|pattern| glob::matches(pattern, &key))
    }
}

fn normal(name: &str) -> String {
    name.to_lowercase().replace('_', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(arguments: &[&str]) -> String {
        let mut bytes = Vec::new();
        for argument in arguments {
            bytes.extend_from_slice(argument.as_bytes());
            bytes.push(0);
        }
        Redactor::new(&["x-tenant".to_owned()]).line(&bytes)
    }

    #[test]
    fn a_programs_line_is_cut_at_the_first_secret() {
        let redactor = Redactor::default();
        for (line, redacted) in [
            ("no such table: carts", "no such table: carts"),
            ("GET http://shop/cart?page=2 took 3 ms", "GET http://shop/cart?page=2 took 3 ms"),
            (r#"{"level":"error","authorization":"Bearer hunter2"}"#, r#"{"level":"error","authorization [redacted]"#),
            ("headers=map[Authorization:[Bearer hunter2]]", "headers=map[Authorization [redacted]"),
            (r#"login failed password="two hunter2 words""#, "login failed password [redacted]"),
            ("cannot reach postgres://u:hunter2@db/shop", "cannot reach postgres://[redacted]@db/shop"),
            ("sent Bearer hunter2 to shop", "sent Bearer [redacted]"),
            (r#"{\"password\":\"hunter2\"}"#, r#"{\"password [redacted]"#),
        ] {
            assert_eq!(redactor.text(line), redacted);
            assert!(!redactor.text(line).contains("hunter2"));
        }
    }

    #[test]
    fn what_is_no_secret_stays_as_it_is() {
        assert_eq!(line(&["ls", "-l", "", "/var/log"]), "ls -l /var/log");
        assert_eq!(line(&["java", "-Xmx=4g", "-jar", "a.jar"]), "java -Xmx=4g -jar a.jar");
        assert_eq!(line(&["curl", "http://shop/cart?page=2&size=3"]), "curl http://shop/cart?page=2&size=3");
        assert_eq!(line(&["nginx", "-g", "daemon off;"]), "nginx -g daemon off;");
    }

    #[test]
    fn a_secret_leaves_in_no_form() {
        for arguments in [
            &["mysql", "--password=hunter2", "shop"][..],
            &["mysql", "--password", "hunter2", "shop"],
            &["mysql", "--password", "-hunter2", "shop"],
            &["env", "DB_PASSWORD=hunter2", "web"],
            &["web", "-token=hunter2"],
            &["web", "--client-secret", "hunter2"],
            &["web", "--ApiKey", "hunter2"],
            &["curl", "-H", "Authorization: Bearer hunter2", "http://shop"],
            &["curl", "--header=Authorization: Bearer hunter2", "http://shop"],
            &["curl", "-HAuthorization:Basic hunter2"],
            &["curl", "https://user:hunter2@shop/cart"],
            &["curl", "https://shop/cart?access_token=hunter2"],
            &["curl", "-d", "{\"password\":\"hunter2\"}"],
            &["curl", "-d", "{\"user\": \"me\", \"password\": \"hunter2\"}"],
            &["sh", "-c", "mysql --password hunter2 shop; curl -H 'Authorization: Bearer hunter2' x"],
            &["sh", "-c", "PASSWORD=hunter2 exec web"],
            &["sh", "-c", "export PASSWORD= hunter2"],
            &["psql", "host=db user=me password=hunter2"],
            &["psql", "postgres://me:hunter2@db/shop?sslmode=off"],
            &["web", "--options=user=me,password=hunter2,"],
            &["web", "--set", "db.password=hunter2"],
            &["web", "X_TENANT=hunter2"],
        ] {
            let line = line(arguments);
            assert!(!line.contains("hunter2"), "{arguments:?}: {line}");
            assert!(line.contains(REDACTED), "{arguments:?}: {line}");
        }
        assert_eq!(line(&["mysql", "--password", "hunter2", "shop"]), "mysql --password [redacted] shop");
    }
}
