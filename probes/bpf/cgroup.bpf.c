/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Which cgroup ids stand for which paths?
 *
 * cgroup_mkdir, cgroup_rmdir → cgroup_record, for the version 2 hierarchy and for the version 1 hierarchy that has the
 * memory controller: the two that records are identified by.
 */
#include "task.h"

/* Of version 1. */
static __always_inline bool identifies(struct cgroup *cgroup)
{
	if (!bpf_core_enum_value_exists(enum cgroup_subsys_id, memory_cgrp_id))
		return false;
	return cgroup->root->subsys_mask >> bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id) & 1;
}

static __always_inline int cgroup_changed(u64 *ctx, u16 kind)
{
	struct cgroup *cgroup = (struct cgroup *)ctx[0];
	const char *path = (const char *)ctx[1];
	u32 hierarchy = cgroup->root->hierarchy_id;
	u64 id, ids = bpf_get_current_pid_tgid(), creator;
	struct cgroup_record *record;
	long bytes;

	if (hierarchy && !identifies(cgroup))
		return 0;
	creator = current_cgroup_id();
	record = record_begin_of(kind, sizeof(*record), creator, false);
	if (!record)
		return 0;
	id = cgroup->kn->id;
	record->header.cgroup_id = hierarchy ? id | CGROUP_V1_MEMORY : id;
	record->header.pid = ids >> 32;
	record->header.tid = ids;
	record->hierarchy = hierarchy;
	record->level = cgroup->level;
	record->creator_cgroup_id = creator;
	bytes = bpf_probe_read_kernel_str(record->path, CGROUP_PATH_BYTES, path);
	record->path_bytes = bytes > 0 ? bytes - 1 : 0;
	record_end(record, false);
	return 0;
}

SEC("tp_btf/cgroup_mkdir")
int cgroup_mkdir(u64 *ctx)
{
	return cgroup_changed(ctx, KIND_CGROUP_MKDIR);
}

SEC("tp_btf/cgroup_rmdir")
int cgroup_rmdir(u64 *ctx)
{
	return cgroup_changed(ctx, KIND_CGROUP_RMDIR);
}
