//! What Kubernetes, systemd and the node itself report.

use tapio_wire::event::{
    Backend, ConfigChange, Conntrack, ContainerState, Detail, Endpoints, Entity, EntityId, EntityKind, KubeEvent, Lane,
    NO_NAME, NodeCondition, Observation, PodState, Rollout, Tcp, UnitState,
};

use super::{MIB, MS, Node, SECOND, address, namespace, workload_of};

impl Node {
    /// A container with all its names, its pod and its workload.
    pub fn kube_container(&mut self, workload: &str, pod: &str, key: &str) -> EntityId {
        self.kube_container_named(workload, pod, key, "web")
    }

    pub fn kube_container_named(&mut self, workload: &str, pod: &str, key: &str, name: &str) -> EntityId {
        self.kube_container_of_image(workload, pod, key, [name, "shop/web:2"])
    }

    /// One with this name and this image.
    pub fn kube_container_of_image(
        &mut self,
        workload: &str,
        pod: &str,
        key: &str,
        [name, image]: [&str; 2],
    ) -> EntityId {
        let pod_id = self.kube_pod(workload, pod);
        let id = tapio_wire::entity_id(EntityKind::Container, key);
        self.body.entities.push(Entity {
            parent: pod_id,
            container_id: format!("{id:016x}").repeat(4),
            pod_uid: format!("uid-{pod}"),
            namespace: namespace(pod),
            pod: pod.split_once('/').map_or("", |(_, name)| name).to_owned(),
            container: name.into(),
            image: image.into(),
            workload: workload.into(),
            ..Entity::named(EntityKind::Container, id, format!("{pod}/{name}"))
        });
        id
    }

    pub fn kube_pod(&mut self, workload: &str, pod: &str) -> EntityId {
        self.kube_pod_of(workload, pod, pod)
    }

    /// One of several that have the same name, one after the other.
    pub fn kube_pod_of(&mut self, workload: &str, pod: &str, uid: &str) -> EntityId {
        let id = tapio_wire::entity_id(EntityKind::Pod, uid);
        let parent = workload_of(workload, &namespace(pod));
        self.body.entities.push(Entity {
            parent,
            pod_uid: format!("uid-{uid}"),
            namespace: namespace(pod),
            pod: pod.split_once('/').map_or("", |(_, name)| name).to_owned(),
            workload: workload.into(),
            ..Entity::named(EntityKind::Pod, id, pod)
        });
        id
    }

    /// The node itself.
    pub fn itself(&self) -> EntityId {
        self.node.id
    }

    pub fn kube_event(&mut self, at: u64, entity: EntityId, reason: &str, message: &str) {
        let [reason, message] = [reason, message].map(|text| self.name(text));
        let field_path = self.name("spec.containers{web}");
        let event = KubeEvent {
            reason,
            message,
            kind: NO_NAME,
            namespace: NO_NAME,
            name: NO_NAME,
            field_path,
            component: NO_NAME,
            count: 1,
            first_ns: 0,
            last_ns: 0,
            is_warning: true,
        };
        self.push(at, entity, 0, Detail::KubeEvent(Box::new(event)));
    }

    pub fn container_ended(&mut self, at: u64, entity: EntityId, reason: &str, exit_code: i32) {
        let reason = self.name(reason);
        let state = ContainerState {
            container: NO_NAME,
            image: NO_NAME,
            reason,
            message: NO_NAME,
            exit_code,
            signal: 0,
            restart_count: 1,
            started_ns: 0,
            finished_ns: 0,
            state: 3,
            is_last: true,
            is_ready: false,
            role: 0,
            memory_limit_bytes: 0,
            cpu_limit_milli: 0,
        };
        self.push(at, entity, 0, Detail::ContainerState(Box::new(state)));
    }

    pub fn pod_state(&mut self, at: u64, entity: EntityId, reason: &str, is_deleting: bool) {
        self.pod_says(at, entity, [reason, ""], is_deleting);
    }

    /// The same with what is said beside the reason. What kubelet ended or refused is Failed; what is only deleted runs until it ends.
    pub fn pod_says(&mut self, at: u64, entity: EntityId, [reason, message]: [&str; 2], is_deleting: bool) {
        let runs = ["", "EvictionByEvictionAPI", "DeletionByTaintManager", "PreemptionByScheduler", "Preempted"];
        let phase = if runs.contains(&reason) { "Running" } else { "Failed" };
        self.pod_is(at, entity, phase, [reason, message], is_deleting);
    }

    /// The same of a pod in this phase.
    pub fn pod_is(&mut self, at: u64, entity: EntityId, phase: &str, [reason, message]: [&str; 2], is_deleting: bool) {
        let [reason, phase] = [reason, phase].map(|text| self.name(text));
        let message = if message.is_empty() { NO_NAME } else { self.name(message) };
        let state = PodState {
            phase,
            reason,
            message,
            deletion_ns: u64::from(is_deleting),
            deletion_grace_s: 30,
            is_ready: false,
            is_scheduled: true,
            is_gone: false,
            qos: 0,
        };
        self.push(at, entity, 0, Detail::PodState(Box::new(state)));
    }

    pub fn node_condition(&mut self, at: u64, condition: &str, status: u8) {
        let condition = self.name(condition);
        let state = NodeCondition { condition, reason: NO_NAME, message: NO_NAME, since_ns: 0, status };
        let node = self.itself();
        self.push(at, node, 0, Detail::NodeCondition(Box::new(state)));
    }

    pub fn rollout(&mut self, at: u64, workload: &str, namespace: &str, images_before: Option<&str>) {
        self.rollout_of(at, workload, namespace, images_before, "shop/web:2");
    }

    /// A workload goes to these images.
    pub fn rollout_of(&mut self, at: u64, workload: &str, namespace: &str, images_before: Option<&str>, images: &str) {
        let entity = workload_of(workload, namespace);
        let images_before = images_before.map_or(NO_NAME, |images| self.name(images));
        let [images, in_namespace] = [images, namespace].map(|text| self.name(text));
        let rollout = Rollout {
            kind: NO_NAME,
            namespace: in_namespace,
            name: NO_NAME,
            images,
            images_before,
            reason: NO_NAME,
            message: NO_NAME,
            generation: 2,
            observed_generation: 2,
            desired: 3,
            updated: 1,
            ready: 2,
            unavailable: 1,
            is_gone: false,
        };
        self.body.entities.push(Entity {
            namespace: namespace.into(),
            workload: workload.into(),
            ..Entity::named(EntityKind::Workload, entity, workload)
        });
        self.push(at, entity, 0, Detail::Rollout(Box::new(rollout)));
    }

    pub fn config_change(&mut self, at: u64, used_by: Vec<EntityId>) {
        let [kind, name, resource_version] = ["ConfigMap", "web-config", "42"].map(|text| self.name(text));
        let change = ConfigChange { kind, namespace: NO_NAME, name, resource_version, used_by, change: 2 };
        let node = self.itself();
        self.push(at, node, 0, Detail::ConfigChange(Box::new(change)));
    }

    /// A Service at 10.96.0.`last` with one backend.
    pub fn service(&mut self, at: u64, name: &str, last: u8, port: u16, pod: EntityId, is_ready: bool) {
        let (namespace, service) = name.split_once('/').expect("a namespace");
        let [namespace, service] = [namespace, service].map(|text| self.name(text));
        let endpoints = Endpoints {
            namespace,
            service,
            cluster_addresses: vec![address(last)],
            ports: vec![port],
            backends: vec![Backend { address: address(100 + last), pod, port, is_ready }],
        };
        let node = self.itself();
        self.push(at, node, 0, Detail::Endpoints(Box::new(endpoints)));
    }

    pub fn unit_state(&mut self, at: u64, entity: EntityId, unit: &str, sub_state: &str, result: &str) {
        let [unit, active_state, sub_state, result] = [unit, "failed", sub_state, result].map(|text| self.name(text));
        let state = UnitState {
            unit,
            active_state,
            sub_state,
            result,
            main_code: 1,
            main_status: 1,
            main_pid: 0,
            restarts: 3,
            main_exited_ns: 0,
        };
        self.push(at, entity, 0, Detail::UnitState(Box::new(state)));
    }

    pub fn observation(&mut self, at: u64, entity: EntityId, throttled: u64, pids: u64) {
        let observation = Observation {
            cgroup: NO_NAME,
            memory_limit_bytes: 64 * MIB,
            memory_usage_bytes: 32 * MIB,
            memory_peak_bytes: 0,
            oom_kills: 0,
            limit_hits: 0,
            pids,
            pids_limit: 100,
            throttled,
            throttled_us: throttled * 100_000,
            memory_pressure: 0,
            process: 0,
            process_comm: NO_NAME,
            process_command: NO_NAME,
            process_entity: 0,
            process_uid: 0,
        };
        self.push(at, entity, 0, Detail::Observation(Box::new(observation)));
    }

    /// The table of connections at `entries` of 1000, most of them begun by 10.96.0.`talker`. `dropped` is `u64::MAX` where the
    /// kernel does not report it.
    pub fn conntrack(&mut self, at: u64, entries: u64, dropped: u64, talker: u8) {
        let table = Conntrack {
            entries,
            entries_max: 1000,
            dropped,
            early_dropped: 0,
            top_address: address(talker),
            top_entries: 700,
            looked_at: 1000,
            is_full: entries >= 950,
        };
        let node = self.itself();
        self.push(at, node, 0, Detail::Conntrack(Box::new(table)));
    }

    /// Packets that the kernel dropped for a reason.
    pub fn packet_drop(&mut self, at: u64, entity: EntityId, reason: &str, count: u64) {
        let reason = self.name(reason);
        self.push(at, entity, 0, Detail::PacketDrop { count, reason, interface: 0 });
        self.frame(Lane::Bulk, at + MS);
    }

    /// Connections to 10.96.0.`last`: change 2 refused, 6 SYN retransmitted.
    pub fn connects(&mut self, at: u64, entity: EntityId, last: u8, change: u8) {
        for step in 0..4 {
            let tcp = Tcp {
                source: address(1),
                destination: address(last),
                duration_us: 0,
                kib_sent: 0,
                kib_received: 0,
                source_port: 40_000,
                destination_port: 5432,
                change,
                active: true,
            };
            self.push(at + step * SECOND, entity, 0, Detail::Tcp(tcp));
        }
        self.frame(Lane::Bulk, at + 4 * SECOND);
    }

    pub fn syscall_error(&mut self, at: u64, entity: EntityId, errno: u32) {
        self.push(at, entity, 0, Detail::SyscallError { count: 5, syscall: 1, errno });
        self.frame(Lane::Bulk, at + MS);
    }
}
