//! What Kubernetes says of pods that do not start.

use tapio_wire::event::{
    ContainerState, Curve, Detail, Entity, EntityId, EntityKind, Event, Gap, KubeEvent, LogLines, NO_NAME,
    NodeCondition, ObjectState, PodState, Point, Rollout, Trouble,
};

use super::Node;

impl Node {
    fn container_state(&mut self, at: u64, entity: EntityId, state: u8, [container, reason, message]: [&str; 3]) {
        let [container, reason, message] = [container, reason, message].map(|text| self.name(text));
        let image = self.name("shop/web:2");
        let state = ContainerState {
            container,
            image,
            reason,
            message,
            exit_code: 0,
            signal: 0,
            restart_count: 3,
            started_ns: 0,
            finished_ns: 0,
            state,
            is_last: false,
            is_ready: false,
            role: 0,
            memory_limit_bytes: 0,
            cpu_limit_milli: 0,
        };
        self.push(at, entity, 0, Detail::ContainerState(Box::new(state)));
    }

    /// Kubelet says that a container of a pod waits; what it says names container, reason and message.
    pub fn waits(&mut self, at: u64, entity: EntityId, said: [&str; 3]) {
        self.container_state(at, entity, 1, said);
    }

    /// Reports a waiting ephemeral container, as `kubectl debug` starts it.
    pub fn ephemeral_waits(&mut self, at: u64, entity: EntityId, said: [&str; 3]) {
        self.waits(at, entity, said);
        if let Some(Event { body: Detail::ContainerState(state), .. }) = self.body.events.last_mut() {
            state.role = 2;
        }
    }

    /// Reports an init container that runs.
    pub fn init_runs(&mut self, at: u64, entity: EntityId, container: &str) {
        self.runs(at, entity, container);
        self.of_init();
    }

    /// Reports an init container that ended badly: its name and the reason.
    pub fn init_ends(&mut self, at: u64, entity: EntityId, [container, reason]: [&str; 2]) {
        self.container_state(at, entity, 3, [container, reason, ""]);
        self.of_init();
    }

    fn of_init(&mut self) {
        if let Some(Event { body: Detail::ContainerState(state), .. }) = self.body.events.last_mut() {
            state.role = 1;
        }
    }

    pub fn runs(&mut self, at: u64, entity: EntityId, container: &str) {
        self.container_state(at, entity, 2, [container, "", ""]);
    }

    /// The runtime could not start it; what it said names container, reason and message.
    pub fn start_fails(&mut self, at: u64, entity: EntityId, said: [&str; 3]) {
        self.container_state(at, entity, 3, said);
    }

    /// Reports that the container ended with code 0.
    pub fn completes(&mut self, at: u64, entity: EntityId, container: &str) {
        self.container_state(at, entity, 3, [container, "Completed", ""]);
    }

    /// The scheduler's word on a pod, or that it waits no more.
    pub fn waits_for_a_node(&mut self, at: u64, pod: EntityId, reason: &str, message: &str, is_gone: bool) {
        self.object_state(at, pod, ["Pod", "Waiting", reason, message], is_gone);
    }

    /// A pod waits for a claim: the claim's phase, and the reason of what was said of it.
    pub fn waits_for_a_claim(&mut self, at: u64, pod: EntityId, phase: &str, reason: &str) {
        self.object_state(at, pod, ["PersistentVolumeClaim", phase, reason, "storageclass \"fast\" not found"], false);
        let name = self.name("data-web-0");
        if let Some(Event { body: Detail::ObjectState(state), .. }) = self.body.events.last_mut() {
            state.name = name;
        }
    }

    fn object_state(&mut self, at: u64, entity: EntityId, texts: [&str; 4], is_gone: bool) {
        let [kind, state, reason, message] = texts.map(|text| self.name(text));
        let state = ObjectState {
            kind,
            namespace: NO_NAME,
            name: NO_NAME,
            state,
            reason,
            message,
            current: 0,
            desired: 0,
            is_gone,
        };
        self.push(at, entity, 0, Detail::ObjectState(Box::new(state)));
    }

    /// Somebody changed the specification of `Deployment/web`, say; how says in which way.
    pub fn changed(&mut self, at: u64, workload: &str, namespace: &str, [who, how]: [&str; 2]) {
        let entity = self.kube_workload(workload, namespace);
        let (kind, name) = workload.split_once('/').expect("a kind and a name");
        let texts = [kind, namespace, name, "Changed", who, how];
        let [kind, namespace, name, state, reason, message] = texts.map(|text| self.name(text));
        let state =
            ObjectState { kind, namespace, name, state, reason, message, current: 2, desired: 2, is_gone: false };
        self.push(at, entity, 0, Detail::ObjectState(Box::new(state)));
    }

    /// An Event about an object of Kubernetes as a whole.
    pub fn said(&mut self, at: u64, entity: EntityId, kind: &str, reason: &str, message: &str) {
        self.said_of(at, entity, [kind, "web", reason, message]);
    }

    /// Reports an Event about the object of this kind and name.
    pub fn said_of(&mut self, at: u64, entity: EntityId, texts: [&str; 4]) {
        let [kind, name, reason, message] = texts.map(|text| self.name(text));
        let [namespace, component] = ["shop", "kubelet"].map(|text| self.name(text));
        let event = KubeEvent {
            reason,
            message,
            kind,
            namespace,
            name,
            field_path: NO_NAME,
            component,
            count: 1,
            first_ns: 0,
            last_ns: 0,
            is_warning: true,
        };
        self.push(at, entity, 0, Detail::KubeEvent(Box::new(event)));
    }

    /// The collector left out process events of a container, or has stopped to.
    pub fn floods(&mut self, at: u64, entity: EntityId, count: u32) {
        let (what, reason) =
            (self.name("process events"), self.name(if count > 0 { "flood" } else { "flood is over" }));
        let gap = Gap { what, reason, from_ns: at, until_ns: at, found_gone: count };
        self.push(at, entity, 0, Detail::Gap(Box::new(gap)));
    }

    /// What the collector sees in a cgroup that lives.
    pub fn trouble(&mut self, at: u64, entity: EntityId, what: &str, place: &str, is_over: bool) {
        self.trouble_of(at, entity, [what, place, "dd"], is_over);
    }

    /// Reports the trouble of a process, or of a container that Kubernetes names: what, where and whose it is.
    pub fn trouble_of(&mut self, at: u64, entity: EntityId, texts: [&str; 3], is_over: bool) {
        let [what, place, comm] = texts.map(|text| self.name(text));
        let since_ns = at.saturating_sub(60 * super::SECOND);
        let trouble = Trouble { what, place, comm, since_ns, value: 97, limit: 100, is_over };
        self.push(at, entity, 4711, Detail::Trouble(Box::new(trouble)));
    }

    /// What Kubernetes says of a pod's change of resources in place, and that it says so no more.
    pub fn resize(&mut self, at: u64, pod: EntityId, reason: &str, message: &str, is_gone: bool) {
        self.object_state(at, pod, ["Pod", "PodResizePending", reason, message], is_gone);
    }

    /// All containers of a pod are restarted.
    pub fn all_restart(&mut self, at: u64, pod: EntityId) {
        self.object_state(at, pod, ["Pod", "AllContainersRestarting", "", ""], false);
    }

    /// Kubernetes says that a node is ready, or is not and why.
    pub fn node_is_ready(&mut self, at: u64, message: &str) {
        let [condition, reason, text] = ["Ready", "KubeletNotReady", message].map(|text| self.name(text));
        let status = u8::from(message.is_empty());
        let state = NodeCondition { condition, reason, message: text, since_ns: 0, status };
        let node = self.itself();
        self.push(at, node, 0, Detail::NodeCondition(Box::new(state)));
    }

    /// What Kubernetes says of a node, to the collector that watches for all: condition, reason and message.
    pub fn condition_of(&mut self, at: u64, name: &str, texts: [&str; 3], status: u8) {
        let id = tapio_wire::node_id(name);
        self.calls(id, name);
        let [condition, reason, message] = texts.map(|text| self.name(text));
        let since_ns = self.booted_ns + at - 60 * super::SECOND;
        let state = NodeCondition { condition, reason, message, since_ns, status };
        self.push(at, id, 0, Detail::NodeCondition(Box::new(state)));
        self.lethal(at);
    }

    /// Kubernetes says how a workload `web` rolls out: its owner, kind and reason; pods updated, ready and unavailable.
    pub fn rolls_out(&mut self, at: u64, [owner, kind, reason]: [&str; 3], [updated, ready, unavailable]: [u32; 3]) {
        let entity = self.kube_workload(owner, "shop");
        let [kind, namespace, name, reason] = [kind, "shop", "web", reason].map(|text| self.name(text));
        let rollout = Rollout {
            kind,
            namespace,
            name,
            images: NO_NAME,
            images_before: NO_NAME,
            reason,
            message: NO_NAME,
            generation: 1,
            observed_generation: 1,
            desired: 3,
            updated,
            ready,
            unavailable,
            is_gone: false,
        };
        self.push(at, entity, 0, Detail::Rollout(Box::new(rollout)));
    }

    /// What it calls a node.
    pub fn calls(&mut self, node: u64, name: &str) {
        self.body.entities.push(Entity::named(EntityKind::Node, node, name));
    }

    /// The node goes on, and reports nothing of what it reported before.
    pub fn goes_on(&mut self, seconds: std::ops::Range<u64>) {
        let other = self.container("c9", "other");
        for at in seconds.step_by(20) {
            self.exit(at * super::SECOND, super::Process::child(other, at as u32, "sh"), 0);
            self.lethal(at * super::SECOND);
        }
    }

    /// How a container's memory went, MiB, ten seconds apart, of which nothing is page cache; it used half a core.
    pub fn curve(&mut self, at: u64, entity: EntityId, limit_bytes: u64, mib: impl IntoIterator<Item = u32>) {
        let point = |mib| Point { memory_kib: mib << 10, cpu_milli: 500, ..Point::default() };
        self.curve_of(at, entity, ("/web", limit_bytes), mib.into_iter().map(point).collect());
    }

    /// Any curve, of a cgroup and its limit.
    pub fn curve_of(&mut self, at: u64, entity: EntityId, (cgroup, limit_bytes): (&str, u64), points: Vec<Point>) {
        let cgroup = self.name(cgroup);
        let curve = Curve { cgroup, limit_bytes, interval_ns: 10 * super::SECOND, points };
        self.push(at, entity, 0, Detail::Curve(Box::new(curve)));
    }

    /// The last lines that a container wrote.
    pub fn log_lines(&mut self, at: u64, process: super::Process, lines: &[&str]) {
        let lines = lines.iter().map(|line| self.name(line)).collect();
        self.push(at, process.entity, process.pid, Detail::LogLines(Box::new(LogLines { lines })));
    }

    /// A pod whose workload nobody has reported yet.
    pub fn pod_without_workload(&mut self, pod: &str) -> EntityId {
        let id = tapio_wire::entity_id(EntityKind::Pod, pod);
        self.body.entities.push(Entity { pod_uid: format!("uid-{pod}"), ..Entity::named(EntityKind::Pod, id, pod) });
        id
    }

    /// A container of this pod.
    pub fn container_of_pod(&mut self, pod: EntityId, name: &str, key: &str) -> EntityId {
        let id = tapio_wire::entity_id(EntityKind::Container, key);
        self.body.entities.push(Entity {
            parent: pod,
            container_id: format!("{id:016x}").repeat(4),
            container: name.into(),
            ..Entity::named(EntityKind::Container, id, name)
        });
        id
    }

    /// A workload, with its names.
    pub fn kube_workload(&mut self, workload: &str, namespace: &str) -> EntityId {
        let id = super::workload_of(workload, namespace);
        self.body.entities.push(Entity {
            namespace: namespace.into(),
            workload: workload.into(),
            ..Entity::named(EntityKind::Workload, id, format!("{namespace}/{workload}"))
        });
        id
    }

    /// A Job has given up.
    pub fn job_failed(&mut self, at: u64, namespace: &str, job: &str, reason: &str) {
        let entity = super::workload_of(&format!("Job/{job}"), namespace);
        let texts = ["Job", namespace, job, "shop/import:1", reason, "Job has reached the specified backoff limit"];
        let [kind, namespace, name, images, reason, message] = texts.map(|text| self.name(text));
        let rollout = Rollout {
            kind,
            namespace,
            name,
            images,
            images_before: NO_NAME,
            reason,
            message,
            generation: 1,
            observed_generation: 1,
            desired: 1,
            updated: 0,
            ready: 0,
            unavailable: 4,
            is_gone: false,
        };
        self.push(at, entity, 0, Detail::Rollout(Box::new(rollout)));
    }

    /// A pod's object is gone.
    pub fn pod_gone(&mut self, at: u64, pod: EntityId) {
        let phase = self.name("Pending");
        let state = PodState {
            phase,
            reason: NO_NAME,
            message: NO_NAME,
            deletion_ns: 1,
            deletion_grace_s: 0,
            is_ready: false,
            is_scheduled: true,
            is_gone: true,
            qos: 0,
        };
        self.push(at, pod, 0, Detail::PodState(Box::new(state)));
    }
}
