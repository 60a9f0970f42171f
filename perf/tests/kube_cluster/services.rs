//! Services whose backend dies on one server's node, and whose clients are on another's. What Kubernetes says of the Services goes
//! to the clients' server, so that neither has all of it.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::elsewhere::{Elsewhere, NODE, Running};
use super::{SERVERS, a_server_each, is_named, of_container, servers_are};
use crate::kube_node::installed::{COLLECTOR, NATS, Pod, SERVER, Tapio};
use crate::kube_node::{Namespace, await_that, container, has_node, kubectl, pod, setting};

const TCP_PORT: u16 = 5432;
const DNS_PORT: u16 = 53;
/// How long one attempt to reach a Service may take.
const ATTEMPT: Duration = Duration::from_secs(1);
/// The lab's DNS server, with what the account of its pod may ask.
const DNS_SERVER: &str = "/usr/bin/python3 /lab/dns.py 0.0.0.0 https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT \
    $(busybox cat /var/run/secrets/kubernetes.io/serviceaccount/token)";

#[test]
fn consequences_on_another_servers_node_are_found_once() {
    if !has_node("consequences_on_another_servers_node_are_found_once") {
        return;
    }
    // The probes of both nodes see one kernel: the network is left to the second node's.
    let tapio = Tapio::install_all_with(&[("enable_network: true", "enable_network: false")]);
    for what in [NATS, SERVER, COLLECTOR] {
        tapio.rolled_out(what);
    }
    servers_are(&tapio, SERVERS);
    let spaces = ["shop", "till", "desk"].map(Namespace::make);
    // Before anybody watches the network: until a Service is served, those who try it are refused.
    let database = Service::tcp(&spaces[0], "db");
    let dns = Service::dns(&spaces[0], "kube-dns");
    let name = format!("db.{}.svc.cluster.local", spaces[0].0);
    await_that("that the Services are served", |seen| {
        *seen = format!("{}, {}", database.address, dns.address);
        (database.answers() && dns.resolves(&name)).then_some(())
    });

    let elsewhere = Elsewhere::make();
    let (_, mut collector) = a_server_each(&tapio, |server| elsewhere.network_collector(server));
    [&database, &dns].into_iter().for_each(|service| service.is_known(&tapio));
    refusals_are_a_consequence(&tapio, &elsewhere, &database);
    lookups_that_fail_are_joined(&tapio, &elsewhere, &dns, &spaces, &name);

    let status = collector.stop().unwrap_or_else(|error| panic!("{error}"));
    assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", collector.output());
    drop((spaces, elsewhere));
    tapio.uninstall();
}

/// A Service with one backend. The backend is a pod of the node that reaches its memory limit when the test asks for it.
struct Service<'a> {
    namespace: &'a Namespace,
    name: &'static str,
    /// Its cluster address.
    address: String,
}

impl<'a> Service<'a> {
    fn tcp(namespace: &'a Namespace, name: &'static str) -> Self {
        let server = format!("busybox nc -ll -p {TCP_PORT} -e /bin/busybox true");
        Self::make(namespace, name, ("TCP", TCP_PORT), backend(name, &server, "24Mi"))
    }

    /// A DNS server: the lab's, with this machine's Python.
    fn dns(namespace: &'a Namespace, name: &'static str) -> Self {
        let rights = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
            "subjects": [{"kind": "ServiceAccount", "name": "default"}],
        });
        namespace.apply(vec![rights]);
        let mut backend = backend(name, DNS_SERVER, "96Mi");
        let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/kube");
        let folders = [("usr", "/usr"), ("lib", "/lib"), ("lib64", "/lib64"), ("lab", lab.to_str().expect("a path"))];
        for (name, folder) in folders {
            let mount = json!({"name": name, "mountPath": format!("/{name}"), "readOnly": true});
            add(&mut backend["spec"]["containers"][0]["volumeMounts"], mount);
            add(&mut backend["spec"]["volumes"], json!({"name": name, "hostPath": {"path": folder}}));
        }
        // Where the folders are.
        backend["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": setting("TAPIO_TEST_NODE")});
        Self::make(namespace, name, ("UDP", DNS_PORT), backend)
    }

    fn make(namespace: &'a Namespace, name: &'static str, (protocol, port): (&str, u16), backend: Value) -> Self {
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"selector": {"app": name}, "ports": [{"protocol": protocol, "port": port}]},
        });
        namespace.apply(vec![service, backend]);
        namespace.wait_running(&format!("pod/{name}"));
        let address = namespace.get(&format!("service/{name}"), "{.spec.clusterIP}");
        Self { namespace, name, address }
    }

    fn answers(&self) -> bool {
        let address: SocketAddr = format!("{}:{TCP_PORT}", self.address).parse().expect("an address");
        TcpStream::connect_timeout(&address, ATTEMPT).is_ok()
    }

    /// One lookup, within a second.
    fn lookup(&self, name: &str) -> String {
        format!("nslookup -type=a -timeout=1 -retry=1 {name} {}", self.address)
    }

    fn resolves(&self, name: &str) -> bool {
        let output = Command::new("busybox").args(self.lookup(name).split(' ')).output().expect("busybox starts");
        output.status.success()
    }

    /// Waits until the second node's server has archived its backend.
    fn is_known(&self, tapio: &Tapio) {
        let is_it = |event: &Value| {
            let detail = &event["detail"];
            let is_it = detail["namespace"] == *self.namespace.0 && detail["service"] == self.name;
            is_it && detail["ready"] == 1 && event["entity"]["node"] == NODE
        };
        await_that(&format!("the endpoints of {}", self.name), |seen| {
            let options = ["events", "--newest", "--kind", "endpoints", "--limit", "500"];
            let events = tapio.tapioctl_json(&options).map_err(|error| seen.clone_from(&error)).ok()?;
            *seen = events.iter().map(|event| format!("\n{event}")).collect();
            events.iter().any(is_it).then_some(())
        });
    }

    /// Lets its backend die of its memory limit. What comes after it does not serve.
    fn kill(&self) {
        let exec = ["-n", &self.namespace.0, "exec", self.name, "--", "/bin/busybox", "touch", "/state/end"];
        kubectl(&exec).expect("it is told");
    }

    fn is_of_backend(&self) -> impl Fn(&str) -> bool + use<> {
        of_container(self.namespace, self.name, "app")
    }
}

fn add(list: &mut Value, value: Value) {
    list.as_array_mut().expect("a list").push(value);
}

/// A pod that serves until there is a file.
fn backend(name: &str, server: &str, memory: &str) -> Value {
    let script = format!(
        "[ ! -e /state/end ] || exec busybox sleep 600; {server} & \
         while [ ! -e /state/end ]; do busybox usleep 100000; done; exec busybox tail /dev/zero"
    );
    let mut server = container("app", &script);
    server["resources"] = json!({"limits": {"memory": memory}});
    server["volumeMounts"] = json!([{"name": "state", "mountPath": "/state"}]);
    let mut pod = pod(name, "Always", server);
    pod["metadata"]["labels"] = json!({"app": name});
    pod["spec"]["volumes"] = json!([{"name": "state", "emptyDir": {}}]);
    pod
}

/// The client ships to one server, the backend's death to the other: one finding, of which the refusals are a consequence.
fn refusals_are_a_consequence(tapio: &Tapio, elsewhere: &Elsewhere, service: &Service) {
    let connects =
        format!("busybox nc -w 3 {} {TCP_PORT} </dev/null >/dev/null 2>&1; busybox usleep 300000", service.address);
    let client = elsewhere.run(service.namespace, "web", &connects);
    service.kill();
    let of_it = service.is_of_backend();
    let refused = format!(" is refused by service {}/{}", service.namespace.0, service.name);
    let title = format!("{}/web/app{refused}", service.namespace.0);
    await_consequence(tapio, "memory-limit-kill", &of_it);
    drop(client);
    let is_whole = |one: &Value| {
        let consequences = one["consequences"].as_array().map_or(&[][..], Vec::as_slice);
        matches!(consequences, [one] if one["pattern"] == "upstream-refused" && one["title"] == *title)
    };
    let is_it = is_named(&of_it);
    let found = tapio.found_alike(SERVERS, "memory-limit-kill", |one| is_it(one) && is_whole(one));
    stands_alone_nowhere(tapio, |one| one["title"].as_str().is_some_and(|title| title.ends_with(&refused)));
    println!("{} from both: {}, and: {title}", found["id"], found["title"]);
}

/// No server sees the DNS server's death and the lookups that fail in three namespaces: one finding of all of it.
fn lookups_that_fail_are_joined(
    tapio: &Tapio,
    elsewhere: &Elsewhere,
    service: &Service,
    spaces: &[Namespace],
    name: &str,
) {
    let looks_up = format!("busybox {} >/dev/null 2>&1; busybox usleep 300000", service.lookup(name));
    let clients: Vec<Running> = spaces.iter().map(|space| elsewhere.run(space, "client", &looks_up)).collect();
    service.kill();
    tapio.finding("dns-is-down", |_| true);
    drop(clients);
    let found = tapio.found_alike(SERVERS, "dns-is-down", |_| true);
    let summary = found["summary"].as_str().unwrap_or_default();
    let died = format!("the DNS backend {}/{}/app had died", service.namespace.0, service.name);
    assert!(summary.contains(&died), "{found}");
    stands_alone_nowhere(tapio, |one| one["pattern"] == "dns-lookups-fail");
    println!("{} from both: {}: {summary}", found["id"], found["title"]);
}

/// Waits for a finding with a consequence.
fn await_consequence(tapio: &Tapio, pattern: &str, is_it: impl Fn(&str) -> bool) {
    await_that(&format!("{pattern} with a consequence"), |seen| {
        let all = tapio.tapioctl_json(&["findings", "--limit", "500"]).map_err(|error| seen.clone_from(&error)).ok()?;
        *seen =
            all.iter().map(|one| format!("\n{} {} {}", one["pattern"], one["title"], one["consequences"])).collect();
        let is_meant = |one: &&Value| one["pattern"] == pattern && one["entity"]["name"].as_str().is_some_and(&is_it);
        all.iter().filter(is_meant).any(|one| one["consequences"][0].is_object()).then_some(())
    });
}

/// Waits until no server has such a finding by itself any more.
fn stands_alone_nowhere(tapio: &Tapio, is_it: impl Fn(&Value) -> bool) {
    await_that("that none of these stands by itself", |seen| {
        let servers = tapio.pods("server");
        let found: Result<Vec<_>, String> = servers.iter().map(Pod::known_findings).collect();
        let found = found.map_err(|error| seen.clone_from(&error)).ok()?;
        *seen = found.iter().flatten().filter(|one| is_it(one)).map(|one| format!("\n{one}")).collect();
        (servers.len() == SERVERS && seen.is_empty()).then_some(())
    });
}
