//! `tapio-server check` and `tapio-server config`: what may be configured, and whether a file does it right.

use std::fmt;
use std::path::Path;

use super::{CommandError, Verdict, print};
use crate::config::Config;
use crate::findings::PatternSet;
use crate::render::clean;

/// Reads a configuration and the patterns that it names, and says what there is.
///
/// # Errors
/// [`CommandError::Usage`] when one is refused: the text names file, line and key.
pub fn check(config: Option<&Path>, patterns: Option<&Path>) -> Result<Verdict, CommandError> {
    if config.is_none() && patterns.is_none() {
        return Err(CommandError::Usage("name the file to check with --config, or patterns with --patterns".into()));
    }
    let refused = |error: &dyn fmt::Display| CommandError::Usage(error.to_string());
    let loaded = Config::load(config).map_err(|error| refused(&error))?;
    let directory = patterns.or(loaded.correlation.patterns.as_deref());
    let built_in = PatternSet::load(None).map_err(|error| refused(&error))?.patterns().len();
    // One line, whatever a file is called.
    let set = PatternSet::load(directory).map_err(|error| refused(&clean(&error.to_string())))?;
    let has_none = directory.filter(|_| set.own().is_empty()).map(NoPattern);
    if let Some(none) = has_none.filter(|_| patterns.is_some()) {
        return Err(refused(&none));
    }
    if let Some(config) = config {
        print(&format!("{}: accepted\n", clean(&config.display().to_string())))?;
    }
    match (directory, has_none) {
        (_, Some(none)) => print(&format!("{none}\n"))?,
        (Some(directory), None) => {
            let all = set.patterns().len();
            let directory = clean(&directory.display().to_string());
            print(&format!("{directory}: accepted; with it there are {all} patterns, {built_in} are built in\n"))?;
        }
        (None, None) => {}
    }
    for own in set.own().iter().filter(|own| own.is_built_in) {
        print(&format!("{}: replaces the built-in pattern {}\n", clean(&own.file), own.id))?;
    }
    Ok(Verdict::Done)
}

/// Error: a directory holds no pattern.
#[derive(Clone, Copy)]
pub(super) struct NoPattern<'a>(pub &'a Path);

impl fmt::Display for NoPattern<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let directory = clean(&self.0.display().to_string());
        write!(f, "{directory}: no pattern in it: one is a file that ends in .yaml or .yml")
    }
}

/// Prints every key: as YAML with defaults, or as tables.
///
/// # Errors
/// [`CommandError::Output`].
pub fn print_config(is_reference: bool) -> Result<Verdict, CommandError> {
    print(&if is_reference { Config::reference() } else { Config::commented_defaults() })?;
    Ok(Verdict::Done)
}
