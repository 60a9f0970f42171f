//! The names in a client's certificate, which rustls has verified by then.

use rustls::pki_types::CertificateDer;

/// Names of a certificate at most; more are not looked at.
const NAMES_MAX: usize = 64;
/// The object identifier of a common name, 2.5.4.3, with its tag and length.
const COMMON_NAME: [u8; 5] = [0x06, 0x03, 0x55, 0x04, 0x03];
/// The user name that Kubernetes gives a node begins so.
const NODE_USER: &str = "system:node:";

/// The names in a client's verified certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateNames {
    /// The subject's common name.
    pub common: Option<String>,
    /// The DNS names among its subject alternative names.
    pub dns: Vec<String>,
}

impl CertificateNames {
    /// Reads them; what cannot be read is not there.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let Ok(certificate) = webpki::EndEntityCert::try_from(certificate) else {
            return Self::default();
        };
        let dns = certificate.valid_dns_names().take(NAMES_MAX).map(str::to_owned).collect();
        Self { common: common_name(certificate.subject()), dns }
    }

    /// The node for which this is Kubernetes' own certificate.
    pub fn node_user(&self) -> Option<&str> {
        self.common.as_deref()?.strip_prefix(NODE_USER)
    }

    /// Every node that it may stand for.
    pub fn nodes(&self) -> Vec<String> {
        let common = self.common.as_deref().map(|name| name.strip_prefix(NODE_USER).unwrap_or(name).to_owned());
        common.into_iter().chain(self.dns.iter().cloned()).collect()
    }
}

/// The last common name of a subject (RFC 5280, 4.1.2.4): a sequence of sets of pairs of identifier and text.
fn common_name(mut subject: &[u8]) -> Option<String> {
    let mut found = None;
    while !subject.is_empty() {
        let (mut set, rest) = element(subject)?;
        subject = rest;
        while !set.is_empty() {
            let (pair, rest) = element(set)?;
            set = rest;
            if let Some(value) = pair.strip_prefix(&COMMON_NAME) {
                let (text, _) = element(value)?;
                found = std::str::from_utf8(text).ok();
            }
        }
    }
    found.filter(|name| !name.is_empty() && name.len() <= 253).map(str::to_owned)
}

/// The content of the first element of DER bytes, and what follows.
fn element(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&length, rest) = der.get(1..)?.split_first()?;
    let (length, rest) = match length {
        0..=0x7f => (usize::from(length), rest),
        0x81 => (usize::from(*rest.first()?), &rest[1..]),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), &rest[2..]),
        _ => return None,
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(common: &str, dns: &[&str]) -> CertificateDer<'static> {
        let names: Vec<String> = dns.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).expect("names");
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
        params.distinguished_name.push(rcgen::DnType::CommonName, common);
        let key = rcgen::KeyPair::generate().expect("a key");
        params.self_signed(&key).expect("a certificate").der().clone()
    }

    #[test]
    fn common_and_dns_names_are_read() {
        let names = CertificateNames::of(&certificate("system:node:n1", &["n1", "n1.example"]));
        assert_eq!(names.common.as_deref(), Some("system:node:n1"));
        assert_eq!(names.dns, ["n1", "n1.example"]);
        assert_eq!(names.node_user(), Some("n1"));
        assert_eq!(names.nodes(), ["n1", "n1", "n1.example"]);
        assert_eq!(CertificateNames::of(&certificate("collector", &[])).node_user(), None);
    }

    #[test]
    fn overlong_names_and_missing_certificates_give_no_name() {
        assert_eq!(CertificateNames::of(&certificate(&"n".repeat(200), &[])).nodes(), ["n".repeat(200)]);
        assert_eq!(CertificateNames::of(&CertificateDer::from(vec![0x30; 300])), CertificateNames::default());
        let subject = [0x31, 0x0b, 0x30, 0x09, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x02, b'n', b'1'];
        assert_eq!(common_name(&subject).as_deref(), Some("n1"));
        for cut in 0..subject.len() {
            assert_eq!(common_name(&subject[..cut]), None, "{cut}");
        }
    }
}
