//! A real server of Azure's blobs on loopback.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ring::hmac;

use crate::archive_support::{PATIENCE, wait_until};

/// The account and its key, which every Azurite has.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
const VERSION: &str = "2021-08-06";
const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// The bytes that base64 stands for, without a look at what ends it.
fn decoded(text: &str) -> Vec<u8> {
    let digits = text.bytes().filter_map(|digit| DIGITS.iter().position(|known| *known == digit));
    let bits: Vec<bool> = digits.flat_map(|value| (0..6).rev().map(move |bit| value >> bit & 1 == 1)).collect();
    bits.chunks_exact(8).map(|bits| bits.iter().fold(0, |byte, bit| byte << 1 | u8::from(*bit))).collect()
}

fn encoded(bytes: &[u8]) -> String {
    let bits: Vec<bool> = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1 == 1)).collect();
    let digit = |bits: &[bool]| {
        let value = (0..6).fold(0, |value, bit| value << 1 | usize::from(bits.get(bit).copied().unwrap_or(false)));
        char::from(DIGITS[value])
    };
    let mut text: String = bits.chunks(6).map(digit).collect();
    text.extend(std::iter::repeat_n('=', (4 - text.len() % 4) % 4));
    text
}

/// Azurite with one container, `archive`; it ends with this.
pub struct Azure {
    port: u16,
    child: Child,
}

impl Azure {
    /// Starts one. `None` where there is none and it is not required.
    pub fn start() -> Option<Self> {
        let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target folder").join("tools");
        let program = tools.join("azurite/node_modules/.bin/azurite-blob");
        if !program.is_file() {
            assert!(
                std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"),
                "no azurite-blob: deploy/local/install.sh azure installs it"
            );
            eprintln!("SKIP: no azurite-blob");
            return None;
        }
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        // It ends with the thread that started it, however that ends.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--blobHost", "127.0.0.1"])
            .args(["--blobPort", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("azurite-blob starts");
        let server = Self { port, child };
        wait_until("Azure listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        server.make_container();
        Some(server)
    }

    fn make_container(&self) {
        let now = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT");
        let empty = "\n".repeat(11);
        let text = format!(
            "PUT\n{empty}x-ms-date:{now}\nx-ms-version:{VERSION}\n/{ACCOUNT}/{ACCOUNT}/archive\nrestype:container"
        );
        let key = hmac::Key::new(hmac::HMAC_SHA256, &decoded(KEY));
        let signature = encoded(hmac::sign(&key, text.as_bytes()).as_ref());
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        write!(
            stream,
            "PUT /{ACCOUNT}/archive?restype=container HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nx-ms-date: {now}\r\nx-ms-version: \
             {VERSION}\r\nAuthorization: SharedKey {ACCOUNT}:{signature}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            self.port
        )
        .expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        assert!(answer.contains(" 201 "), "{answer}");
    }

    /// The service's address.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}/{ACCOUNT}", self.port)
    }

    /// Returns the settings for programs.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT.into()),
            ("AZURE_STORAGE_ACCOUNT_KEY", KEY.into()),
            ("AZURE_STORAGE_ENDPOINT", self.endpoint()),
            ("AZURE_ALLOW_HTTP", "true".into()),
        ]
    }
}

impl Drop for Azure {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
