//! The page in a real browser: `perf/lab/web/browser.py` drives Chromium against servers that got real frames. With TAPIO_SHOTS
//! it leaves screenshots in that folder of the target folder.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::archive_support::skip;
use crate::auth::Authority;
use crate::correlate_node::{MIB, MS, Node, Process, SECOND, SIGKILL, SIGSEGV};
use crate::web::{kill, links, node, release, until};
use crate::whole_server::{Stream, Whole, hello};
use tapio_wire::program::tls::ServerFiles;

const TOKEN: &str = "open;sesame";

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// A node's stream to a server, and what of the node was sent.
struct Sending {
    node: Node,
    stream: Stream,
    sent: usize,
}

impl Sending {
    async fn to(server: &Whole, node: Node) -> Self {
        let hello = hello(&node.node.name, node.epoch);
        let mut stream = Stream::open(server.channel().await, "", hello).await.expect("it is taken");
        stream.welcome().await.expect("welcome");
        let mut sending = Self { node, stream, sent: 0 };
        sending.send().await;
        sending
    }

    async fn send(&mut self) {
        for bytes in &self.node.bytes[self.sent..] {
            self.stream.frame(bytes.clone()).await;
        }
        self.sent = self.node.bytes.len();
        self.stream.acknowledged(self.sent as u64).await;
    }
}

/// A shop whose database is killed, so that its clients are refused.
fn shop() -> Node {
    let mut node = node("node-a");
    release(&mut node, "Deployment/web", "shop");
    kill(&mut node, "Deployment/web", "shop/web-7d4b9c-x2k8p", 100, "nginx");
    let db = node.kube_container("StatefulSet/db", "shop/db-0", "db");
    let pod = node.kube_pod("StatefulSet/db", "shop/db-0");
    node.service(50 * SECOND, "shop/db", 7, 5432, pod, true);
    node.lethal(903 * SECOND);
    let process = Process::init(db, 700, "postgres");
    node.oom(910 * SECOND, process, 512 * MIB, 512 * MIB);
    node.signal(910 * SECOND, process, SIGKILL, None);
    node.exit(910 * SECOND + MS, process, SIGKILL);
    node.container_ended(911 * SECOND, db, "OOMKilled", 137);
    node.observation(911 * SECOND, db, 0, 3);
    node.lethal(912 * SECOND);
    let client = node.kube_container("Deployment/checkout", "shop/checkout-0", "checkout");
    node.connects(913 * SECOND, client, 7, 2);
    node
}

/// A machine with a unit that crashes, a pod that cannot start, and events that were lost.
fn edge() -> Node {
    let mut node = node("node-b");
    node.lethal(690 * SECOND);
    node.lose(12);
    let unit = node.unit("ingest.service");
    node.exit(700 * SECOND, Process::of_node(unit, 4242, "ingest"), SIGSEGV);
    node.lethal(701 * SECOND);
    let waiting = node.kube_container_named("Deployment/mailer", "mail/mailer-5f6d-abcde", "mailer", "mailer");
    let said = "Back-off pulling image \"registry.example/mailer:9\"";
    node.waits(800 * SECOND, waiting, ["mailer", "ImagePullBackOff", said]);
    node.lethal(801 * SECOND);
    node
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_reads_filters_follows_and_copies_in_a_browser() {
    let has =
        |program: &str| Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target folder");
    let axe = target.join("tools/axe/node_modules/axe-core/axe.min.js");
    if !has("chromium") || !has("python3") || !axe.is_file() {
        return skip("web_browser", "Chromium and axe-core: deploy/local/install.sh chromium");
    }
    let server = Whole::start(|_| {}).await;
    let address = server.pipeline.http_address;
    let mut shop = Sending::to(&server, shop()).await;
    let edge = Sending::to(&server, edge()).await;
    drop(edge);
    let list = until(address, "/?view=list&workload=Deployment/web", "href=\"/f/").await;
    let finding = links(&list, "/f/").into_iter().next().expect("a finding");
    for (path, part) in [
        (finding.as_str(), "Memory until then"),
        ("/", "StatefulSet/db"),
        ("/", "ingest.service"),
        ("/", "Deployment/mailer"),
        ("/", "The collector of node-b is gone"),
    ] {
        until(address, path, part).await;
    }
    let authority = Authority::new();
    let file = |name: &str| authority.folder.path().join(name);
    std::fs::write(file("token"), TOKEN).expect("written");
    let guarded = Whole::start(|config| {
        config.server.auth.token_file = Some(file("token"));
        config.server.tls_enabled = true;
        config.server.tls = ServerFiles { cert: file("server.pem"), key: file("server.key"), client_ca: None };
    })
    .await;

    let mut command = Command::new("python3");
    command.arg(top().join("perf/lab/web/browser.py")).arg("--axe").arg(axe);
    command.args(["--server", &format!("http://{address}"), "--finding", &finding, "--token", TOKEN]);
    command.args(["--guarded", &format!("https://{}", guarded.pipeline.http_address)]);
    if let Some(shots) = std::env::var_os("TAPIO_SHOTS") {
        command.arg("--shots").arg(target.join(shots));
    }
    let mut browser = command.stdout(Stdio::piped()).spawn().expect("Python starts");
    let mut lines = BufReader::new(browser.stdout.take().expect("its output")).lines();
    while let Some(Ok(line)) = tokio::task::block_in_place(|| lines.next()) {
        println!("{line}");
        if line == "ready" {
            kill(&mut shop.node, "Deployment/cart", "shop/cart-0", 200, "node");
            shop.send().await;
        }
    }
    let status = tokio::task::block_in_place(|| browser.wait()).expect("it ends");
    assert!(status.success(), "the browser's script says above what is wrong");
}
