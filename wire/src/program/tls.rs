//! TLS from PEM files that may change while the program runs.
//!
//! What enters: paths. What leaves: a rustls configuration for the next handshake. What must hold: the files are looked
//! at before every handshake, and [`Watched::refresh`] does so in between. Unusable files change nothing: half written,
//! expired, or a key of another certificate. They are logged once, and show in [`Watched::is_stale`]. A configuration
//! that a running stream uses is never touched.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use schemars::JsonSchema;
use serde::Deserialize;

/// Why files cannot be used. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path}: {error}; name a PEM file that this process may read")]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{path} holds no {what} in PEM form; is it half written, or is another file meant?")]
    Empty { path: PathBuf, what: &'static str },
    #[error("{path}: the certificate expired {0} s ago; renew it", .seconds)]
    Expired { path: PathBuf, seconds: u64 },
    #[error("{path}: {error}; certificate, key and CA must belong together")]
    Unusable { path: PathBuf, error: rustls::Error },
    #[error("{path}: {problem}; the file must hold the certificates of the CA that signs the clients'")]
    Verifier { path: PathBuf, problem: String },
}

/// `grpc.tls:` of a client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClientFiles {
    /// The certificates of the CA that signs the servers'.
    #[schemars(example = "/etc/tapio/tls/ca.pem")]
    pub ca: PathBuf,
    /// Client certificate chain, for a server that asks for one (PEM).
    #[schemars(example = "/etc/tapio/tls/collector.pem")]
    pub cert: Option<PathBuf>,
    /// Private key of the client certificate (PEM).
    #[schemars(example = "/etc/tapio/tls/collector.key")]
    pub key: Option<PathBuf>,
    /// The name in the server's certificate; default: the endpoint's host.
    #[schemars(example = "tapio-server.tapio-system.svc")]
    pub server_name: Option<String>,
}

/// `server.tls:` of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServerFiles {
    /// The certificate chain.
    #[schemars(example = "/etc/tapio/tls/server.pem")]
    pub cert: PathBuf,
    /// Private key of the server's certificate (PEM).
    #[schemars(example = "/etc/tapio/tls/server.key")]
    pub key: PathBuf,
    /// The certificates of the CA that signs the clients'; with it, a client without a certificate is refused.
    #[schemars(example = "/etc/tapio/tls/clients-ca.pem")]
    pub client_ca: Option<PathBuf>,
}

/// A configuration that can be built from files.
pub trait FromFiles: Clone + Send + 'static {
    type Config: Send + Sync;

    /// Every file that is read.
    fn paths(&self) -> Vec<&Path>;

    /// Builds it from the files' contents, in the order of [`FromFiles::paths`]; returns when the own certificate expires too.
    ///
    /// # Errors
    /// See [`TlsError`].
    fn build(&self, contents: &[Vec<u8>]) -> Result<(Self::Config, Option<u64>), TlsError>;
}

impl FromFiles for ClientFiles {
    type Config = ClientConfig;

    fn paths(&self) -> Vec<&Path> {
        let own = self.cert.as_deref().into_iter().chain(self.key.as_deref());
        std::iter::once(self.ca.as_path()).chain(own).collect()
    }

    fn build(&self, contents: &[Vec<u8>]) -> Result<(ClientConfig, Option<u64>), TlsError> {
        let unusable = |error| TlsError::Unusable { path: self.ca.clone(), error };
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().map_err(unusable)?;
        let builder = builder.with_root_certificates(roots(&self.ca, &contents[0])?);
        let (mut config, expires) = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                let (chain, expires) = chain(cert, &contents[1])?;
                let unusable = |error| TlsError::Unusable { path: cert.clone(), error };
                let key = private_key(key, &contents[2])?;
                (builder.with_client_auth_cert(chain, key).map_err(unusable)?, Some(expires))
            }
            _ => (builder.with_no_client_auth(), None),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok((config, expires))
    }
}

impl FromFiles for ServerFiles {
    type Config = ServerConfig;

    fn paths(&self) -> Vec<&Path> {
        [self.cert.as_path(), &self.key].into_iter().chain(self.client_ca.as_deref()).collect()
    }

    fn build(&self, contents: &[Vec<u8>]) -> Result<(ServerConfig, Option<u64>), TlsError> {
        let unusable = |error| TlsError::Unusable { path: self.cert.clone(), error };
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let builder = builder.with_safe_default_protocol_versions().map_err(unusable)?;
        let builder = match &self.client_ca {
            Some(path) => {
                let roots = Arc::new(roots(path, &contents[2])?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
                let refused = |error: rustls::server::VerifierBuilderError| TlsError::Verifier {
                    path: path.clone(),
                    problem: error.to_string(),
                };
                builder.with_client_cert_verifier(verifier.map_err(refused)?)
            }
            None => builder.with_no_client_auth(),
        };
        let (chain, expires) = chain(&self.cert, &contents[0])?;
        let key = private_key(&self.key, &contents[1])?;
        let mut config = builder.with_single_cert(chain, key).map_err(unusable)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok((config, Some(expires)))
    }
}

/// Reads PEM files again when they change.
pub struct Watched<F: FromFiles> {
    files: F,
    state: Mutex<WatchedState<F::Config>>,
}

struct WatchedState<C> {
    config: Arc<C>,
    /// What was last looked at, usable or not.
    seen: Vec<Vec<u8>>,
    /// What makes the files unusable at present.
    problem: Option<String>,
    expires: Option<u64>,
    changes: u64,
}

impl<F: FromFiles> Watched<F> {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// When they cannot be used: there is no last good configuration yet.
    pub fn load(files: F) -> Result<Self, TlsError> {
        let seen = read(&files)?;
        let (config, expires) = files.build(&seen)?;
        let state = WatchedState { config: Arc::new(config), seen, problem: None, expires, changes: 0 };
        Ok(Self { files, state: Mutex::new(state) })
    }

    /// The files that it is made of.
    pub fn files(&self) -> &F {
        &self.files
    }

    /// What the next handshake shall use: made of the files as they are, or the last good one.
    pub fn current(&self) -> Arc<F::Config> {
        self.refresh();
        Arc::clone(&self.lock().config)
    }

    /// Looks at the files.
    pub fn refresh(&self) {
        let read = read(&self.files);
        let mut state = self.lock();
        let built = match read {
            Ok(contents) if contents == state.seen => return,
            Ok(contents) => {
                let built = self.files.build(&contents);
                state.seen = contents;
                built
            }
            Err(error) => Err(error),
        };
        match built {
            Ok((config, expires)) => {
                state.config = Arc::new(config);
                state.expires = expires;
                state.problem = None;
                state.changes += 1;
                tracing::info!(expires_unix = expires, "TLS files reloaded: the next handshakes use them");
            }
            Err(error) => {
                let problem = error.to_string();
                if state.problem.as_ref() != Some(&problem) {
                    tracing::error!(error = problem, "TLS files are unusable: keeping the previous ones");
                }
                state.problem = Some(problem);
            }
        }
    }

    /// Whether the files are not usable, and older ones are in use.
    pub fn is_stale(&self) -> bool {
        self.lock().problem.is_some()
    }

    /// Unix time at which the certificate in use expires, where there is one.
    pub fn expires(&self) -> Option<u64> {
        self.lock().expires
    }

    /// How often new files were taken.
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    fn lock(&self) -> MutexGuard<'_, WatchedState<F::Config>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(files: &impl FromFiles) -> Result<Vec<Vec<u8>>, TlsError> {
    let read = |path: &Path| std::fs::read(path).map_err(|error| TlsError::Read { path: path.into(), error });
    files.paths().into_iter().map(read).collect()
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    certificates
        .ok()
        .filter(|certificates| !certificates.is_empty())
        .ok_or_else(|| TlsError::Empty { path: path.into(), what: "certificate" })
}

fn roots(path: &Path, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        store.add(certificate).map_err(|error| TlsError::Unusable { path: path.into(), error })?;
    }
    Ok(store)
}

/// A chain, and when its first certificate expires.
fn chain(path: &Path, pem: &[u8]) -> Result<(Vec<CertificateDer<'static>>, u64), TlsError> {
    let chain = certificates(path, pem)?;
    let expires =
        not_after(&chain[0]).ok_or_else(|| TlsError::Empty { path: path.into(), what: "X.509 certificate" })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if expires < now {
        return Err(TlsError::Expired { path: path.into(), seconds: now - expires });
    }
    Ok((chain, expires))
}

fn private_key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|_| TlsError::Empty { path: path.into(), what: "private key" })
}

/// The end of a certificate's validity, seconds since 1970 (RFC 5280, 4.1): version, serial number, algorithm and issuer come
/// before it.
fn not_after(certificate: &[u8]) -> Option<u64> {
    let (_, certificate, _) = element(certificate)?;
    let (_, signed, _) = element(certificate)?;
    let (tag, _, mut rest) = element(signed)?;
    if tag == 0xa0 {
        rest = element(rest)?.2;
    }
    let rest = element(rest)?.2;
    let rest = element(rest)?.2;
    let (_, validity, _) = element(rest)?;
    let (tag, text, _) = element(element(validity)?.2)?;
    let digits = |range: std::ops::Range<usize>| std::str::from_utf8(text.get(range)?).ok()?.parse::<u64>().ok();
    // UTCTime has two digits for the year, GeneralizedTime four.
    let (year, at) = match tag {
        0x17 => (digits(0..2).map(|year| if year < 50 { 2000 + year } else { 1900 + year })?, 2),
        0x18 => (digits(0..4)?, 4),
        _ => return None,
    };
    let field = |index: usize| digits(at + 2 * index..at + 2 * index + 2);
    let (month, day) = (field(0)?, field(1)?);
    if !(1..=12).contains(&month) || year < 1970 {
        return None;
    }
    // Days since 1970: the year is counted from March, so that the leap day is its last.
    let (shifted_year, shifted_month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = shifted_year / 4 - shifted_year / 100 + shifted_year / 400;
    let days = 365 * shifted_year + leap_days + (153 * shifted_month + 2) / 5 + day - 1;
    let days = days.checked_sub(719_468)?;
    Some(days * 86_400 + field(2)? * 3600 + field(3)? * 60 + field(4)?)
}

/// The first element of DER bytes: tag, content, and what follows.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (bytes.iter().fold(0, |length, &byte| length << 8 | usize::from(byte)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pair {
        cert: String,
        key: String,
    }

    fn pair(expires: (i32, u8, u8)) -> Pair {
        let mut params = rcgen::CertificateParams::new(vec!["tapio".into()]).expect("a name");
        params.not_after = rcgen::date_time_ymd(expires.0, expires.1, expires.2);
        let key = rcgen::KeyPair::generate().expect("a key");
        let cert = params.self_signed(&key).expect("a certificate");
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }

    fn files(dir: &Path, pair: &Pair) -> ServerFiles {
        let files = ServerFiles { cert: dir.join("cert.pem"), key: dir.join("key.pem"), client_ca: None };
        std::fs::write(&files.cert, &pair.cert).expect("written");
        std::fs::write(&files.key, &pair.key).expect("written");
        files
    }

    #[test]
    fn the_end_of_validity_is_read_in_both_notations() {
        for ((year, month, day), seconds) in
            [((2030, 1, 1), 1_893_456_000), ((2048, 2, 29), 2_466_547_200), ((2060, 12, 31), 2_871_676_800u64)]
        {
            let pem = pair((year, month, day)).cert;
            let der = CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM");
            assert_eq!(not_after(&der), Some(seconds), "{year}");
            for cut in 0..der.len().min(200) {
                assert_eq!(not_after(&der[..cut]), None);
            }
        }
    }

    #[test]
    fn a_bad_pair_changes_nothing_a_good_pair_does() {
        let dir = tempfile::tempdir().expect("a folder");
        let (first, second) = (pair((2090, 1, 1)), pair((2091, 1, 1)));
        let watched = Watched::load(files(dir.path(), &first)).expect("a good pair");
        let before = watched.current();
        assert!(Arc::ptr_eq(&before, &watched.current()) && !watched.is_stale());
        let cert = &watched.files().cert.clone();
        for bad in ["", &second.cert[..second.cert.len() / 2], &second.cert, &pair((2020, 1, 1)).cert] {
            std::fs::write(cert, bad).expect("written");
            assert!(Arc::ptr_eq(&before, &watched.current()), "{bad}");
            assert!(watched.is_stale());
        }
        std::fs::remove_file(cert).expect("removed");
        assert!(Arc::ptr_eq(&before, &watched.current()) && watched.is_stale());
        files(dir.path(), &second);
        assert!(!Arc::ptr_eq(&before, &watched.current()));
        assert!(!watched.is_stale());
        assert_eq!((watched.changes(), watched.expires()), (1, Some(3_818_448_000)));
    }

    #[test]
    fn an_expired_pair_and_a_foreign_key_are_distinguished() {
        let dir = tempfile::tempdir().expect("a folder");
        let error = Watched::load(files(dir.path(), &pair((2020, 1, 1)))).err().expect("refused").to_string();
        assert!(error.contains("expired") && error.contains("cert.pem"), "{error}");
        let mixed = Pair { cert: pair((2090, 1, 1)).cert, key: pair((2090, 1, 1)).key };
        let error = Watched::load(files(dir.path(), &mixed)).err().expect("refused").to_string();
        assert!(error.contains("belong together"), "{error}");
    }
}
