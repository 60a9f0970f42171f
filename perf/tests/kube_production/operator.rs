//! What an operator has and does before `kubectl apply`: an authority with certificates, and a kustomization of their own over the
//! production overlay. Commands and files are those that deploy/README.md shows, so that the page is tried as well.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::json;

use crate::kube_node::{kubectl, setting};

/// Below the lab's volumes.
const STORAGE: &str = "4Gi";
const ARCHIVE_MAX: &str = "2GiB";

/// The names that README.md asks of the server's certificate, and of NATS'.
const SERVER_NAMES: [&str; 2] = ["tapio-server-headless.tapio-system.svc", "tapio-server.tapio-system.svc"];
const NATS_NAME: &str = "tapio-nats.tapio-system.svc";

/// A folder with a checkout's `tapio/deploy`, the operator's `own`, and certificates where the page's commands look for them.
pub struct Operator {
    folder: tempfile::TempDir,
    readme: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Operator {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
        fs::create_dir(folder.path().join("tapio")).expect("made");
        let copied = Command::new("cp").arg("-R").arg(&deploy).arg(folder.path().join("tapio/deploy")).status();
        assert!(copied.expect("cp starts").success(), "{}", deploy.display());
        let readme = fs::read_to_string(deploy.join("README.md")).expect("deploy/README.md");

        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "the operator's authority");
        let key = KeyPair::generate().expect("a key");
        let ca = params.self_signed(&key).expect("a certificate").pem();
        let operator = Self { folder, readme, issuer: Issuer::new(params, key) };
        fs::write(operator.path("ca.crt"), ca).expect("written");
        let (of_server, of_client) = (ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth);
        operator.sign("server", &SERVER_NAMES, vec![of_server.clone(), of_client.clone()]);
        operator.sign("nats", &[NATS_NAME], vec![of_server]);
        operator.sign("collector", &[], vec![of_client.clone()]);
        operator.sign("me", &[], vec![of_client]);
        operator
    }

    /// A file in the folder where the page's commands run.
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join("tapio/deploy").join(file)
    }

    /// Writes `NAME.crt` and `NAME.key`.
    fn sign(&self, name: &str, names: &[&str], usages: Vec<ExtendedKeyUsagePurpose>) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = usages;
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("signed");
        fs::write(self.path(&format!("{name}.crt")), cert.pem()).expect("written");
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).expect("written");
    }

    /// Runs the page's commands that hold a text.
    pub fn run_shown(&self, holding: &str) {
        self.run(&self.path(""), &self.shown("sh", holding));
    }

    fn run(&self, folder: &Path, script: &str) {
        let status = Command::new("sh").args(["-euc", script]).current_dir(folder).status().expect("sh starts");
        assert!(status.success(), "{status}:\n{script}");
    }

    /// The page's block of a language that holds a text.
    fn shown(&self, language: &str, holding: &str) -> String {
        let blocks = self.readme.split("```").skip(1).step_by(2);
        let mut found = blocks.filter_map(|block| block.strip_prefix(language)).filter(|block| block.contains(holding));
        let block = found.next().unwrap_or_else(|| panic!("deploy/README.md shows no `{holding}`")).to_owned();
        assert!(found.next().is_none(), "deploy/README.md shows `{holding}` twice");
        block
    }

    /// The kustomization of the page, and over it what the lab has otherwise.
    pub fn render(&self) -> String {
        let root = self.folder.path();
        self.run_shown("mkdir own");
        let own = root.join("own");
        fs::write(own.join("kustomization.yaml"), self.shown("yaml", "# own/kustomization.yaml")).expect("written");
        edit(&own.join("server.yaml"), "max_bytes: 40GiB", &format!("max_bytes: {ARCHIVE_MAX}"));

        let lab = root.join("lab");
        fs::create_dir(&lab).expect("made");
        fs::write(lab.join("kustomization.yaml"), lab_kustomization().to_string()).expect("written");
        kubectl(&["kustomize", lab.to_str().expect("a path")]).unwrap_or_else(|error| panic!("{error}"))
    }
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).expect("a file");
    assert_eq!(text.matches(from).count(), 1, "{from} in {}", path.display());
    fs::write(path, text.replace(from, to)).expect("written");
}

/// Images, storage and requests that the lab has; one server, since the ledger and findings of one are asked for.
fn lab_kustomization() -> serde_json::Value {
    let image = |name: &str, setting_name: &str| {
        let image = setting(setting_name);
        let (new_name, key, version) = match (image.split_once('@'), image.rsplit_once(':')) {
            (Some((name, digest)), _) => (name, "digest", digest),
            (None, Some((name, tag))) => (name, "newTag", tag),
            (None, None) => (image.as_str(), "newTag", "latest"),
        };
        json!({"name": format!("registry.internal/{name}"), "newName": new_name, key: version})
    };
    let without = |kind: &str, api: &str| {
        let patch = json!({"$patch": "delete", "apiVersion": api, "kind": kind, "metadata": {"name": "any"}});
        json!({"target": {"kind": kind}, "patch": patch.to_string()})
    };
    let claim = "/spec/volumeClaimTemplates/0/spec";
    let set = json!([
        {"op": "remove", "path": format!("{claim}/storageClassName")},
        {"op": "replace", "path": format!("{claim}/resources/requests/storage"), "value": STORAGE},
        {"op": "replace", "path": "/spec/template/spec/containers/0/resources/requests/cpu", "value": "100m"},
    ]);
    json!({
        "resources": ["../own"],
        "images": [
            image("tapio-server", "TAPIO_TEST_SERVER_IMAGE"),
            image("tapio-collector", "TAPIO_TEST_COLLECTOR_IMAGE"),
            image("nats", "TAPIO_TEST_NATS_IMAGE"),
        ],
        "patches": [
            {"target": {"kind": "StatefulSet", "name": "tapio-server"}, "patch": set.to_string()},
            // The lab's API server is too old for the versions of both.
            without("HorizontalPodAutoscaler", "autoscaling/v2"),
            without("PodDisruptionBudget", "policy/v1"),
        ],
    })
}
