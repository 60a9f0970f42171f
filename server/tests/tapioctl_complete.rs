//! A real shell completes `tapioctl`'s arguments with names that a real query service knows.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::correlate_node::{MIB, MS, Node, Process, SECOND, SIGKILL};
use crate::programs::TAPIOCTL;
use crate::tapioctl_output::{output, serve_of};

/// Has bash complete the last of these words, and gives what it offers.
fn offered(server: &str, words: &[&str]) -> Vec<String> {
    let script = r#"
        source <(tapioctl completions bash)
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_TYPE=9
        "$(complete -p tapioctl | grep -o "_clap[a-z_]*")" tapioctl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let folder = Path::new(TAPIOCTL).parent().expect("a folder").display();
    let path = format!("{folder}:{}", std::env::var("PATH").expect("a PATH"));
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "bash", "tapioctl"]).args(words).env("PATH", path).env("TAPIO_SERVER", server);
    let ran = bash.output().expect("bash runs");
    let printed = String::from_utf8(ran.stdout).expect("UTF-8");
    assert!(ran.status.success() && ran.stderr.is_empty(), "{}", String::from_utf8_lossy(&ran.stderr));
    let names = printed.lines().map(|line| line.trim().to_owned());
    // Options are offered beside them.
    names.filter(|line| !line.is_empty() && !line.starts_with('-')).collect()
}

#[test]
fn a_shell_completes_names_that_the_server_knows() {
    let mut node = Node::new("n1");
    for (workload, pod, pid) in [("Deployment/web", "shop/web-1", 100), ("Deployment/api", "shop/api$(date)", 101)] {
        let web = node.kube_container(workload, pod, pod);
        node.oom(100 * SECOND, Process::init(web, pid, "app"), 64 * MIB, 64 * MIB);
        node.exit(100 * SECOND + MS, Process::init(web, pid, "app"), SIGKILL);
    }
    node.lethal(101 * SECOND);
    let server = serve_of(node);
    let (_, listed) = output(&server.address, &["findings", "--json"]);
    let ids = listed.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["id"].clone());
    let mut ids: Vec<String> = ids.map(|id| id.as_str().expect("an id").to_owned()).collect();
    ids.sort();
    assert!(!ids.is_empty(), "{listed}");

    assert_eq!(offered(&server.address, &["finding", ""]), ids);
    assert_eq!(offered(&server.address, &["ack", &ids[0][..6]]), ids[..1]);
    // What a workload calls itself is no command of this shell.
    assert_eq!(
        offered(&server.address, &["why", ""]),
        ["deployment/shop/api", "deployment/shop/web", "node/n1", "pod/shop/web-1"]
    );
    assert_eq!(offered(&server.address, &["why", "-n", "shop", "po"]), ["pod/shop/web-1"]);
    let elsewhere = ["--server", &server.address, "bundle", &ids[0][..8]];
    assert_eq!(offered("127.0.0.1:1", &elsewhere), ids[..1]);
    assert!(offered(&server.address, &["fin"]).contains(&"findings".to_owned()));
}

#[test]
fn a_server_that_does_not_answer_completes_nothing() {
    // It takes connections, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let began = std::time::Instant::now();
    let address = silent.local_addr().expect("an address").to_string();
    assert_eq!(offered(&address, &["finding", ""]), [""; 0]);
    assert_eq!(offered("127.0.0.1:1", &["finding", ""]), [""; 0]);
    assert!(began.elapsed() < Duration::from_secs(60), "whoever types waits");
}
