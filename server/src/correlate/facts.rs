//! What Kubernetes, systemd and the collector said, as facts with fields by name.
//!
//! What enters: an event of these sources and its frame. What must hold: a field that was not reported is absent, so that a
//! pattern that asks for it does not match. Lists are cut, so that a fact stays small whatever the cluster says.

use std::sync::Arc;

use tapio_wire::event::{
    ArchivedCgroupUse, ArchivedConntrack, ArchivedContainerState, ArchivedCurve, ArchivedDetail, ArchivedEndpoints,
    ArchivedKubeEvent, ArchivedLogLines, ArchivedNodeCondition, ArchivedObjectState, ArchivedObservation,
    ArchivedPodState, ArchivedRollout, ArchivedTrouble, ArchivedUnitState, ERASED, EntityId,
};
use tapio_wire::frame::Frame;
use tapio_wire::program::units::human_bytes;

use super::clue::{Address, ClueKind, Fact, FactValue, ServiceEndpoints};
use super::field_name::FieldName;

/// Others that one fact may be about.
const RELATED_MAX: usize = 64;
/// Bytes kept of a text.
const TEXT_BYTES_MAX: usize = 512;

/// The kind of the fact that an event states.
pub fn kind(detail: &ArchivedDetail) -> Option<ClueKind> {
    Some(match detail {
        ArchivedDetail::SignalDelivered { .. } => ClueKind::Delivered,
        ArchivedDetail::PodState(_) => ClueKind::PodState,
        ArchivedDetail::ContainerState(_) => ClueKind::ContainerState,
        ArchivedDetail::KubeEvent(_) => ClueKind::KubeEvent,
        ArchivedDetail::NodeCondition(_) => ClueKind::NodeCondition,
        ArchivedDetail::Rollout(_) => ClueKind::Rollout,
        ArchivedDetail::ConfigChange(_) => ClueKind::ConfigChange,
        ArchivedDetail::Endpoints(_) => ClueKind::Endpoints,
        ArchivedDetail::ObjectState(_) => ClueKind::ObjectState,
        ArchivedDetail::UnitState(_) => ClueKind::UnitState,
        ArchivedDetail::UnitJob(_) => ClueKind::UnitJob,
        ArchivedDetail::Observation(_) => ClueKind::Observation,
        ArchivedDetail::Gap(_) => ClueKind::Gap,
        ArchivedDetail::Conntrack(_) => ClueKind::Conntrack,
        ArchivedDetail::CgroupUse(_) => ClueKind::CgroupUse,
        ArchivedDetail::Trouble(_) => ClueKind::Trouble,
        ArchivedDetail::Curve(_) => ClueKind::Curve,
        ArchivedDetail::LogLines(_) => ClueKind::LogLines,
        _ => return None,
    })
}

/// Collects the fields that were reported.
struct Fields<'a> {
    frame: &'a Frame,
    list: Vec<(FieldName, FactValue)>,
}

impl Fields<'_> {
    fn text(&mut self, name: &'static str, index: u32) {
        if let Some(text) = self.frame.body().name(index) {
            self.word(name, text);
        }
    }

    fn word(&mut self, name: &'static str, text: &str) {
        let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
        if !text.is_empty() {
            self.list.push((name.into(), FactValue::Text(Arc::from(text))));
        }
    }

    fn number(&mut self, name: &'static str, number: u64) {
        self.list.push((name.into(), FactValue::Number(number)));
    }

    /// A number; 0 and the largest stand for "not reported" or "no limit".
    fn known(&mut self, name: &'static str, number: u64) {
        if number != 0 && number != u64::MAX {
            self.number(name, number);
        }
    }

    /// A number; only the largest stands for "not reported".
    fn known_or_zero(&mut self, name: &'static str, number: u64) {
        if number != u64::MAX {
            self.number(name, number);
        }
    }

    fn flag(&mut self, name: &'static str, flag: bool) {
        self.list.push((name.into(), FactValue::Flag(flag)));
    }
}

/// How much of a container's last lines a fact holds.
const LOG_BYTES_MAX: usize = 4096;
/// Members of a full cgroup that a fact names.
const MEMBERS_MAX: usize = 5;

/// The fact that an event states. `describe` names an entity, by its id and its cgroup's path.
pub fn fact(
    frame: &Frame,
    detail: &ArchivedDetail,
    time_ns: u64,
    describe: impl Fn(EntityId, &str) -> String,
) -> Option<Fact> {
    let kind = kind(detail)?;
    let mut fields = Fields { frame, list: Vec::new() };
    let (mut related, mut endpoints, mut talker) = (Vec::new(), None, None);
    match detail {
        ArchivedDetail::SignalDelivered { signal, code, comm, .. } => {
            fields.number("signal", signal.to_native().into());
            fields.number("code", u64::from(code.to_native().unsigned_abs()));
            fields.text("comm", comm.to_native());
        }
        ArchivedDetail::PodState(pod) => fields.pod_state(pod),
        ArchivedDetail::ContainerState(state) => fields.container_state(state),
        ArchivedDetail::KubeEvent(event) => fields.kube_event(event),
        ArchivedDetail::NodeCondition(condition) => fields.node_condition(condition, time_ns),
        ArchivedDetail::Rollout(rollout) => fields.rollout(rollout),
        ArchivedDetail::ConfigChange(change) => {
            fields.text("object_kind", change.kind.to_native());
            fields.text("object_namespace", change.namespace.to_native());
            fields.text("object_name", change.name.to_native());
            fields.text("resource_version", change.resource_version.to_native());
            fields.word("change", ["unknown", "made", "changed", "gone"][usize::from(change.change.min(3))]);
            related.extend(change.used_by.iter().take(RELATED_MAX).map(|id| id.to_native()));
        }
        ArchivedDetail::Endpoints(service) => endpoints = Some(Box::new(fields.endpoints(service, &mut related))),
        ArchivedDetail::ObjectState(object) => fields.object_state(object),
        ArchivedDetail::UnitState(unit) => fields.unit_state(unit),
        ArchivedDetail::UnitJob(job) => {
            fields.text("unit", job.unit.to_native());
            fields.text("result", job.result.to_native());
        }
        ArchivedDetail::Observation(seen) => fields.observation(seen),
        // Somebody had an event erased here: nothing was missed.
        ArchivedDetail::Gap(gap) if frame.body().name(gap.reason.to_native()) == Some(ERASED) => return None,
        ArchivedDetail::Gap(gap) => {
            fields.text("what", gap.what.to_native());
            fields.text("reason", gap.reason.to_native());
            fields.number("lasted", gap.until_ns.to_native().saturating_sub(gap.from_ns.to_native()));
            fields.number("found_gone", gap.found_gone.to_native().into());
        }
        ArchivedDetail::Conntrack(table) => talker = fields.conntrack(table),
        ArchivedDetail::CgroupUse(seen) => fields.cgroup_use(seen, describe),
        ArchivedDetail::Trouble(trouble) => fields.trouble(trouble, time_ns),
        ArchivedDetail::LogLines(log) => fields.log_lines(log),
        ArchivedDetail::Curve(curve) => fields.curve(curve)?,
        _ => return None,
    }
    Some(Fact { kind, fields: fields.list, related, endpoints, talker })
}

/// What each kind of event states.
impl Fields<'_> {
    fn pod_state(&mut self, pod: &ArchivedPodState) {
        self.text("phase", pod.phase.to_native());
        self.text("reason", pod.reason.to_native());
        self.text("message", pod.message.to_native());
        self.flag("ready", pod.is_ready);
        self.flag("deleting", pod.deletion_ns.to_native() > 0);
        self.flag("gone", pod.is_gone);
        self.known("grace", u64::from(pod.deletion_grace_s.to_native()) * 1_000_000_000);
    }

    fn container_state(&mut self, state: &ArchivedContainerState) {
        self.text("container", state.container.to_native());
        self.text("image", state.image.to_native());
        self.word("state", ["unknown", "waiting", "running", "terminated"][usize::from(state.state.min(3))]);
        self.text("reason", state.reason.to_native());
        self.text("message", state.message.to_native());
        if state.state == 3 {
            self.number("exit_code", u64::from(state.exit_code.to_native().unsigned_abs()));
        }
        self.number("restart_count", state.restart_count.to_native().into());
        self.flag("last", state.is_last);
        self.flag("ready", state.is_ready);
        self.word("role", ["app", "init", "ephemeral"][usize::from(state.role.min(2))]);
        self.known("memory_limit", state.memory_limit_bytes.to_native());
        self.known("cpu_limit", state.cpu_limit_milli.to_native());
    }

    fn kube_event(&mut self, event: &ArchivedKubeEvent) {
        self.text("reason", event.reason.to_native());
        self.text("message", event.message.to_native());
        self.word("type", if event.is_warning { "Warning" } else { "Normal" });
        self.text("object_kind", event.kind.to_native());
        self.text("object_namespace", event.namespace.to_native());
        self.text("object_name", event.name.to_native());
        self.text("field_path", event.field_path.to_native());
        self.text("component", event.component.to_native());
        self.number("count", event.count.to_native().into());
    }

    fn node_condition(&mut self, condition: &ArchivedNodeCondition, time_ns: u64) {
        self.text("condition", condition.condition.to_native());
        self.word("status", ["false", "true", "unknown"][usize::from(condition.status.min(2))]);
        self.text("reason", condition.reason.to_native());
        self.text("message", condition.message.to_native());
        let header = self.frame.header();
        let now_ns = header.realtime_ns.saturating_sub(header.boottime_ns.saturating_sub(time_ns));
        if let Some(lasted) = now_ns.checked_sub(condition.since_ns.to_native()).filter(|&lasted| lasted < now_ns) {
            self.number("lasted", lasted);
        }
    }

    fn rollout(&mut self, rollout: &ArchivedRollout) {
        self.text("object_kind", rollout.kind.to_native());
        self.text("object_namespace", rollout.namespace.to_native());
        self.text("object_name", rollout.name.to_native());
        self.text("images", rollout.images.to_native());
        self.text("images_before", rollout.images_before.to_native());
        self.flag("image_changed", self.frame.body().name(rollout.images_before.to_native()).is_some());
        self.text("reason", rollout.reason.to_native());
        self.text("message", rollout.message.to_native());
        self.number("generation", rollout.generation.to_native());
        self.number("desired", rollout.desired.to_native().into());
        self.number("updated", rollout.updated.to_native().into());
        self.number("ready_replicas", rollout.ready.to_native().into());
        self.number("unavailable", rollout.unavailable.to_native().into());
        self.flag("gone", rollout.is_gone);
    }

    /// Also adds the pods behind the Service to `related`.
    fn endpoints(&mut self, service: &ArchivedEndpoints, related: &mut Vec<EntityId>) -> ServiceEndpoints {
        let body = self.frame.body();
        let name = |index| body.name(index).unwrap_or("");
        let (namespace, service_name) = (name(service.namespace.to_native()), name(service.service.to_native()));
        self.word("object_namespace", namespace);
        self.word("object_name", service_name);
        let backends = service.backends.iter().take(RELATED_MAX);
        let backends: Vec<_> = backends
            .map(|backend| (backend.address, backend.port.to_native(), backend.pod.to_native(), backend.is_ready))
            .collect();
        self.number("backends", service.backends.len() as u64);
        let ready = service.backends.iter().filter(|backend| backend.is_ready).count() as u64;
        self.number("ready_backends", ready);
        self.number("unready_backends", service.backends.len() as u64 - ready);
        related.extend(backends.iter().map(|backend| backend.2).filter(|&pod| pod != 0));
        ServiceEndpoints {
            name: format!("{namespace}/{service_name}").into(),
            cluster_addresses: service.cluster_addresses.iter().take(RELATED_MAX).copied().collect(),
            ports: service.ports.iter().take(RELATED_MAX).map(|port| port.to_native()).collect(),
            backends,
        }
    }

    fn object_state(&mut self, object: &ArchivedObjectState) {
        self.text("object_kind", object.kind.to_native());
        self.text("object_namespace", object.namespace.to_native());
        self.text("object_name", object.name.to_native());
        self.text("state", object.state.to_native());
        self.text("reason", object.reason.to_native());
        self.text("message", object.message.to_native());
        self.number("current", object.current.to_native());
        self.number("desired", object.desired.to_native());
        self.flag("gone", object.is_gone);
    }

    fn unit_state(&mut self, unit: &ArchivedUnitState) {
        self.text("unit", unit.unit.to_native());
        self.text("active_state", unit.active_state.to_native());
        self.text("sub_state", unit.sub_state.to_native());
        self.text("result", unit.result.to_native());
        self.number("main_status", u64::from(unit.main_status.to_native().unsigned_abs()));
        self.number("restarts", unit.restarts.to_native().into());
    }

    fn observation(&mut self, seen: &ArchivedObservation) {
        self.known("memory_limit", seen.memory_limit_bytes.to_native());
        self.known("memory_usage", seen.memory_usage_bytes.to_native());
        self.known("memory_peak", seen.memory_peak_bytes.to_native());
        self.number("oom_kills", seen.oom_kills.to_native());
        self.number("limit_hits", seen.limit_hits.to_native());
        let (pids, pids_limit) = (seen.pids.to_native(), seen.pids_limit.to_native());
        self.known("pids", pids);
        self.known("pids_limit", pids_limit);
        let has_limit = pids_limit != 0 && pids_limit != u64::MAX;
        self.flag("pids_full", has_limit && pids.saturating_add(pids_limit / 50) >= pids_limit);
        self.number("throttled", seen.throttled.to_native());
        self.number("throttled_time", seen.throttled_us.to_native().saturating_mul(1000));
        self.number("memory_pressure", u64::from(seen.memory_pressure.to_native()) / 100);
        self.text("process_comm", seen.process_comm.to_native());
        self.text("process_command", seen.process_command.to_native());
    }

    /// The address with the most entries, if any entry was looked at.
    fn conntrack(&mut self, table: &ArchivedConntrack) -> Option<Address> {
        let (entries, entries_max) = (table.entries.to_native(), table.entries_max.to_native());
        self.flag("full", table.is_full);
        self.number("entries", entries);
        self.known("entries_max", entries_max);
        if let Some(filled) = entries.saturating_mul(100).checked_div(entries_max) {
            self.number("filled", filled);
        }
        self.known_or_zero("dropped", table.dropped.to_native());
        self.known_or_zero("early_dropped", table.early_dropped.to_native());
        let share = table.top_entries.to_native().saturating_mul(100).checked_div(table.looked_at.to_native())?;
        self.number("talker_share", share);
        Some(table.top_address)
    }

    fn cgroup_use(&mut self, seen: &ArchivedCgroupUse, describe: impl Fn(EntityId, &str) -> String) {
        let body = self.frame.body();
        self.text("limit_cgroup", seen.cgroup.to_native());
        self.number("height", seen.height.to_native().into());
        self.known("memory_usage", seen.usage_bytes.to_native());
        self.known("memory_limit", seen.limit_bytes.to_native());
        let parts = [
            ("anon", seen.anon_bytes.to_native()),
            ("page_cache", seen.file_bytes.to_native()),
            ("shmem", seen.shmem_bytes.to_native()),
            ("kernel_memory", seen.kernel_bytes.to_native()),
        ];
        for (name, bytes) in parts {
            self.known(name, bytes);
        }
        if let Some(&(name, bytes)) = parts.iter().max_by_key(|(_, bytes)| *bytes)
            && bytes > 0
        {
            self.word("mostly", name);
        }
        let limit = seen.limit_bytes.to_native();
        if limit != u64::MAX {
            for ((_, bytes), share) in parts.iter().zip(["anon_share", "page_cache_share", "shmem_share"]) {
                if let Some(percent) = bytes.saturating_mul(100).checked_div(limit) {
                    self.number(share, percent);
                }
            }
        }
        let window_ns = seen.window_ns.to_native();
        if window_ns > 0 {
            self.number("over", window_ns);
            self.number("throttled", seen.throttled.to_native());
            self.number("throttled_time", seen.throttled_us.to_native().saturating_mul(1000));
            let periods = seen.periods.to_native();
            if let Some(share) = seen.throttled.to_native().saturating_mul(100).checked_div(periods) {
                self.number("throttled_share", share);
            }
            self.number("limit_hits", seen.limit_hits.to_native());
            self.number("oom_kills", seen.oom_kills.to_native());
        }
        let members: Vec<String> = seen
            .members
            .iter()
            .take(MEMBERS_MAX)
            .map(|member| {
                let (path, adjustment) = (body.name(member.cgroup.to_native()), member.oom_score_adj.to_native());
                let who = describe(member.entity.to_native(), path.unwrap_or_default());
                let used = human_bytes(member.usage_bytes.to_native());
                format!("{who} {used} (oom_score_adj {adjustment})")
            })
            .collect();
        self.word("members", &members.join(", "));
        self.text("full_mount", seen.full_mount.to_native());
        self.known("full_mount_size", seen.full_mount_bytes.to_native());
        self.flag("mount_full", body.name(seen.full_mount.to_native()).is_some());
    }

    fn trouble(&mut self, trouble: &ArchivedTrouble, time_ns: u64) {
        self.text("what", trouble.what.to_native());
        self.text("place", trouble.place.to_native());
        self.text("process_comm", trouble.comm.to_native());
        self.flag("ended", trouble.is_over);
        self.known("value", trouble.value.to_native());
        self.known("limit", trouble.limit.to_native());
        self.number("lasted", time_ns.saturating_sub(trouble.since_ns.to_native()));
        // Of a pod, it is a container that Kubernetes names.
        if matches!(self.frame.body().name(trouble.what.to_native()), Some("not-ready" | "init-runs" | "starting")) {
            self.text("container", trouble.comm.to_native());
        }
    }

    fn log_lines(&mut self, log: &ArchivedLogLines) {
        let lines: Vec<&str> = log.lines.iter().filter_map(|line| self.frame.body().name(line.to_native())).collect();
        self.number("line_count", lines.len() as u64);
        let text = lines.join(" | ");
        // The newest say most.
        let text = &text[text.ceil_char_boundary(text.len().saturating_sub(LOG_BYTES_MAX))..];
        self.list.push(("lines".into(), FactValue::Text(text.into())));
    }

    /// [`None`] for a curve without points.
    fn curve(&mut self, curve: &ArchivedCurve) -> Option<()> {
        let seen = super::curve::summary(curve)?;
        self.word("shape", seen.shape.name());
        let cgroup = self.frame.body().name(curve.cgroup.to_native()).unwrap_or_default();
        self.flag("of_pod", super::clue::is_pod_cgroup(cgroup));
        self.known("memory_limit", curve.limit_bytes.to_native());
        self.number("first", seen.first_bytes);
        self.number("memory_usage", seen.last_bytes);
        self.number("memory_peak", seen.peak_bytes);
        self.known("growth_per_hour", seen.growth_per_hour);
        self.number("lasted", seen.lasted_ns);
        self.number("cpu_milli", seen.cpu_milli);
        self.number("throttled_share", seen.throttled);
        Some(())
    }
}
