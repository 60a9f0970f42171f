//! A bearer token in a file that may change while the program runs, like a projected service account's.
//!
//! What must hold: the file is read again whenever the token is needed. While it cannot be read or is empty the last
//! good token is used, and that is logged once.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use subtle::ConstantTimeEq;
use tonic::metadata::{Ascii, MetadataValue};

/// Bytes of a token at the most: more is some other file.
const TOKEN_BYTES_MAX: usize = 16 << 10;

/// Why a token cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("cannot read the token {path}: {error}; name a file that this process may read")]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{path} holds no token: one line of visible ASCII characters is wanted")]
    Malformed { path: PathBuf },
}

/// Reads a bearer token from a file again when it changes.
pub struct TokenFile {
    path: PathBuf,
    last: Mutex<Last>,
}

struct Last {
    header: MetadataValue<Ascii>,
    is_stale: bool,
}

impl TokenFile {
    /// Reads it for the first time.
    ///
    /// # Errors
    /// When there is no token in it.
    pub fn load(path: PathBuf) -> Result<Self, TokenError> {
        let header = read(&path)?;
        Ok(Self { path, last: Mutex::new(Last { header, is_stale: false }) })
    }

    /// The value of the header `authorization`, as of now.
    pub fn header(&self) -> MetadataValue<Ascii> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read(&self.path) {
            Ok(header) => *last = Last { header, is_stale: false },
            Err(error) => {
                if !last.is_stale {
                    tracing::error!(%error, "cannot read the token file: using the last good token");
                }
                last.is_stale = true;
            }
        }
        last.header.clone()
    }

    /// Whether a request carries this token. Takes the same time wherever the two differ.
    pub fn admits(&self, authorization: Option<&[u8]>) -> bool {
        self.header().as_encoded_bytes().ct_eq(authorization.unwrap_or_default()).into()
    }
}

/// Adds the token, where there is one, to every request of a client.
#[derive(Clone, Default)]
pub struct Bearer(pub Option<std::sync::Arc<TokenFile>>);

impl tonic::service::Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.header());
        }
        Ok(request)
    }
}

fn read(path: &Path) -> Result<MetadataValue<Ascii>, TokenError> {
    let malformed = || TokenError::Malformed { path: path.into() };
    let text = std::fs::read_to_string(path).map_err(|error| TokenError::Read { path: path.into(), error })?;
    let token = text.trim();
    if token.is_empty() || token.len() > TOKEN_BYTES_MAX || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(malformed());
    }
    let mut header = MetadataValue::try_from(format!("Bearer {token}")).map_err(|_| malformed())?;
    // Kept out of logs and of HPACK's table.
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_token_is_used_unless_it_is_bad() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        assert!(TokenFile::load(file.path().into()).is_err(), "an empty file");
        std::fs::write(file.path(), "first\n").expect("written");
        let token = TokenFile::load(file.path().into()).expect("a token");
        let first = token.header();
        assert_eq!(first.as_encoded_bytes(), b"Bearer first");
        let first = first.as_encoded_bytes();
        assert!(token.admits(Some(first)) && !token.admits(None));
        for other in [&b"Bearer firsT"[..], b"Bearer firs", b"Bearer first "] {
            assert!(!token.admits(Some(other)));
        }
        std::fs::write(file.path(), "two words").expect("written");
        assert!(token.admits(Some(first)), "the last good one holds");
        std::fs::write(file.path(), "second").expect("written");
        assert!(!token.admits(Some(first)));
        assert_eq!(token.header().as_encoded_bytes(), b"Bearer second");
    }
}
