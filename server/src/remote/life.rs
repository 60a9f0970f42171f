//! Which life an archive directory is: a file in it that no backup copies, so that a restored archive begins a new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use ring::rand::{SecureRandom, SystemRandom};
use tapio_wire::program::clock::now_ns;

use super::names;

/// The file's name in the archive's directory; `*.json` would be copied by hand with a stopped archive.
const FILE: &str = "remote.life";

/// The directory's life; the first call for a directory makes it.
pub fn of(dir: &Path) -> io::Result<String> {
    match fs::read_to_string(dir.join(FILE)) {
        Ok(text) if names::is_life(text.trim()) => Ok(text.trim().to_owned()),
        Ok(_) => renew(dir),
        Err(error) if error.kind() == io::ErrorKind::NotFound => renew(dir),
        Err(error) => Err(error),
    }
}

/// Begins a new life.
pub fn renew(dir: &Path) -> io::Result<String> {
    let mut random = [0; 4];
    SystemRandom::new().fill(&mut random).map_err(|_| io::Error::other("the system has no random numbers"))?;
    let now = now_ns();
    let life = names::life(now, u32::from_le_bytes(random));
    let new = dir.join(format!("{FILE}.new"));
    let mut file = File::create(&new)?;
    file.write_all(format!("{life}\n").as_bytes())?;
    file.sync_data()?;
    fs::rename(new, dir.join(FILE))?;
    File::open(dir)?.sync_all()?;
    Ok(life)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_keeps_its_life_until_it_is_renewed() {
        let dir = tempfile::tempdir().expect("a folder");
        let first = of(dir.path()).expect("made");
        assert_eq!(of(dir.path()).expect("read"), first);
        let second = renew(dir.path()).expect("made");
        assert_ne!(first, second);
        assert_eq!(of(dir.path()).expect("read"), second);
        fs::write(dir.path().join(FILE), "half").expect("written");
        assert_ne!(of(dir.path()).expect("made"), "half");
    }
}
