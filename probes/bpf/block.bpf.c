/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * How long does block I/O take, and which was slow, or failed?
 *
 * block_rq_complete → a histogram for each device and operation, and block_io_record. The kernel itself notes when a request was made, as long as the queue's iostats
 * are on (they are by default); without, only failures are recorded. A completion runs in nobody's context: the cgroup is the
 * one that the I/O is charged to, where the version 2 io controller charges it, otherwise the root.
 */
#include "aggregate.h"
#include "task.h"

#define BLOCK_SUMS_MAX 256

#define REQ_OP_MASK 0xff
enum { REQ_OP_READ, REQ_OP_WRITE, REQ_OP_FLUSH, REQ_OP_DISCARD, REQ_OP_SECURE_ERASE = 5, REQ_OP_WRITE_ZEROES = 9 };

#define EIO 5

struct block_key {
	u32 device;
	u32 operation;
};

AGGREGATE(block_latency, BPF_MAP_TYPE_PERCPU_HASH, BLOCK_SUMS_MAX, struct block_key, struct histogram_sums);

/* The tracepoint has a blk_status_t, which is positive; on older kernels a negative errno. */
static __always_inline s32 as_errno(s32 error)
{
	/* By BLK_STS_*: not supported, timeout, no space, transport, target, reservation, medium, protection, resource, I/O. */
	switch (error) {
	case 1:
		return -95;
	case 2:
		return -110;
	case 3:
		return -28;
	case 4:
		return -67;
	case 5:
		return -121;
	case 6:
		return -52;
	case 7:
		return -61;
	case 8:
		return -84;
	case 9:
		return -12;
	default:
		return error > 0 ? -EIO : error;
	}
}

/* 0 without a disk: a read through a typed pointer that is NULL gives 0. */
static __always_inline u32 device(struct request *request)
{
	struct request___before_5_17 *old = (void *)request;
	struct gendisk *disk;

	if (bpf_core_field_exists(struct request_queue, disk))
		disk = request->q->disk;
	else if (bpf_core_field_exists(struct request___before_5_17, rq_disk))
		disk = old->rq_disk;
	else
		return 0;
	return disk->major << 20 | disk->first_minor;
}

static __always_inline u64 charged_cgroup_id(struct request *request)
{
	struct cgroup *cgroup;

	if (!bpf_core_field_exists(struct bio, bi_blkg))
		return CGROUP_ROOT;
	cgroup = request->bio->bi_blkg->blkcg->css.cgroup;
	/* Version 1 knows the cgroup by an id of another hierarchy. */
	if (!cgroup || cgroup->root->hierarchy_id)
		return CGROUP_ROOT;
	return cgroup->kn->id;
}

static __always_inline void sum_up(u32 device, u8 operation, u64 latency)
{
	struct block_key key = { .device = device, .operation = operation };
	struct histogram_sums none = {}, *sums;
	bool is_new;

	if (!kind_is_on(KIND_HISTOGRAM))
		return;
	sums = aggregate_sum(block_latency, &key, &none, &is_new);
	if (sums)
		histogram_add(sums, latency);
	else
		count_unsummed(KIND_HISTOGRAM);
}

SEC("tp_btf/block_rq_complete")
int block_complete(u64 *ctx)
{
	struct request *request = (struct request *)ctx[0];
	s32 error = as_errno(ctx[1]);
	u32 bytes = ctx[2];
	struct tuning *tuning = tuned();
	u64 since = request->start_time_ns;
	u64 now = bpf_ktime_get_ns();
	u64 latency = since && now > since ? now - since : 0;
	struct block_io_record *record;
	u32 disk;
	u8 operation;

	if (!tuning)
		return 0;
	operation = request->cmd_flags & REQ_OP_MASK;
	switch (operation) {
	case REQ_OP_READ:
	case REQ_OP_DISCARD:
		break;
	case REQ_OP_WRITE:
	case REQ_OP_WRITE_ZEROES:
		/* A flush is requested by an empty write. */
		operation = bytes ? REQ_OP_WRITE : REQ_OP_FLUSH;
		break;
	case REQ_OP_SECURE_ERASE:
		operation = REQ_OP_DISCARD;
		break;
	default:
		/*
		 * Zone management; commands that a program handed to the drive; and the flush that the kernel makes of what
		 * was said above, which the latency of who wants it includes.
		 */
		return 0;
	}
	/* The request completes in parts: the last part counts. */
	if (!error && bytes < request->__data_len)
		return 0;
	disk = device(request);
	if (latency)
		sum_up(disk, operation, latency);
	if (!error && (!latency || latency < *(volatile u64 *)&tuning->block_io_slow_ns))
		return 0;
	record = bulk_begin(KIND_BLOCK_IO, sizeof(*record));
	if (!record)
		return 0;
	record->header.cgroup_id = charged_cgroup_id(request);
	record->latency_ns = latency;
	record->bytes = bytes;
	record->device = disk;
	record->error = error;
	record->operation = operation;
	bulk_end(record);
	return 0;
}
