/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Which DNS lookups fail, are slow, or get no answer, and how long do they take?
 *
 * Every packet of the version 2 hierarchy's sockets, out and in → a histogram for each cgroup, and dns_record. A query is
 * remembered by its socket and id until its answer comes, or until user space finds that none came (src/unanswered.rs). UDP
 * to port 53 only: neither TCP nor encrypted DNS. Only clients are recorded; a server's packets have port 53 on the other side.
 * The way in for what comes back is received.bpf.c. Every packet passes.
 */
#include "aggregate.h"
#include "packet.h"

#define QUERIES_MAX 8192
#define ASKING_CGROUPS_MAX 256
#define LABELS_MAX 40
/* A name (255), type and class. */
#define QUESTION_BYTES_MAX 260

#define DNS_PORT 53

struct dns_header {
	u16 id;
	u8 flags;
	/* The lower half of these flags is the response code. */
	u8 rcode;
	u16 questions;
	u16 answers;
	u16 authorities;
	u16 additional;
};

#define IS_ANSWER 0x80
#define OPCODE 0x78

struct query_key {
	u64 socket_cookie;
	u64 id;
};

struct query {
	/* 0 while it is being filled. */
	u64 since_ns;
	u64 cgroup_id;
	u32 pid;
	u32 tid;
	u16 query_type;
	u8 pad[6];
	/* The name, with a dot for each label's length: it begins with a dot. Unchanged from DNS_NAME_BYTES on. */
	u8 question[288];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, QUERIES_MAX);
	__type(key, struct query_key);
	__type(value, struct query);
} dns_queries SEC(".maps");

const volatile struct query empty_query = {};

/* Shared by the CPUs: lookups are rare, and each CPU would need space for all cgroups. */
AGGREGATE(dns_latency, BPF_MAP_TYPE_HASH, ASKING_CGROUPS_MAX, u64, struct histogram_sums);

/* Returns where a DNS message begins in a UDP packet to or from port 53; 0 where there is none. */
static __always_inline u32 message_offset(struct __sk_buff *skb, struct packet *packet, bool is_query)
{
	u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	u16 *ports = (u16 *)(data + packet->offset);

	if ((u8 *)(ports + 2) > end || ports[is_query] != __builtin_bswap16(DNS_PORT))
		return 0;
	return packet->offset + 8;
}

/* Dots for lengths; what follows the name's first DNS_NAME_BYTES - 1 bytes, and what no name should have in it, goes. */
static __always_inline void read_question(struct query *query)
{
	u32 position = 0, index;

	for (index = 0; index < LABELS_MAX; index++) {
		u8 length = query->question[position & 0xff];

		if (!length || length > 63)
			break;
		query->question[position & 0xff] = '.';
		position += length + 1;
	}
	position &= 0xff;
	query->query_type = query->question[position + 1] << 8 | query->question[position + 2];
	for (index = 0; index <= DNS_NAME_BYTES; index++) {
		u8 byte = query->question[index];

		if (index >= position || index == DNS_NAME_BYTES)
			query->question[index] = 0;
		else if (byte <= ' ' || byte > '~')
			query->question[index] = '?';
	}
}

SEC("cgroup_skb/egress")
int dns_query(struct __sk_buff *skb)
{
	struct task_struct *task;
	u64 bytes;
	struct dns_header header;
	struct query_key key = {};
	struct packet packet;
	struct query *query;
	struct ids ids;
	u32 offset;
	u64 cgroup;

	/* Nearly all packets end here. */
	if (!find_payload(skb, &packet) || packet.protocol != IPPROTO_UDP)
		return 1;
	offset = message_offset(skb, &packet, true);
	if (!offset || bpf_skb_load_bytes(skb, offset, &header, sizeof(header)))
		return 1;
	if (header.flags & (IS_ANSWER | OPCODE) || !header.questions)
		return 1;
	task = (struct task_struct *)bpf_get_current_task();
	cgroup = task_cgroup_id(task);
	ids = task_ids(task);
	if (cgroup_is_excluded(cgroup) || (own_tgid && ids.tgid == own_tgid))
		return 1;
	if (!kind_is_on(KIND_DNS) && !kind_is_on(KIND_HISTOGRAM))
		return 1;
	key.socket_cookie = bpf_get_socket_cookie(skb);
	key.id = header.id;
	if (bpf_map_lookup_elem(&dns_queries, &key))
		/* The query was repeated: it counts from the first time. */
		return 1;
	if ((int)bpf_map_update_elem(&dns_queries, &key, (void *)&empty_query, BPF_NOEXIST)) {
		count_unsummed(KIND_DNS);
		return 1;
	}
	query = bpf_map_lookup_elem(&dns_queries, &key);
	if (!query)
		return 1;
	offset += sizeof(header);
	bytes = skb->len - offset;
	/* The verifier must see both bounds: the compiler would merge them into one comparison. */
	asm volatile("" : "+r"(bytes));
	if (bytes > QUESTION_BYTES_MAX)
		bytes = QUESTION_BYTES_MAX;
	asm volatile("" : "+r"(bytes));
	/* An empty name (the root), type and class. */
	if (bytes < 5 || bpf_skb_load_bytes(skb, offset, query->question, bytes)) {
		bpf_map_delete_elem(&dns_queries, &key);
		return 1;
	}
	read_question(query);
	query->cgroup_id = cgroup;
	query->pid = ids.tgid;
	query->tid = ids.pid;
	*(volatile u64 *)&query->since_ns = bpf_ktime_get_boot_ns();
	return 1;
}

/* Copies of a query what a record needs: what is taken out of the map may be reused at once. */
struct asked {
	u64 since_ns;
	u64 cgroup_id;
	u32 pid;
	u32 tid;
	u64 query_type;
	u8 name[DNS_NAME_BYTES];
};

/* Who takes the query out of the map records it: this program or, when the answer comes too late, user space. */
static __always_inline bool take_query(struct __sk_buff *skb, u16 id, struct asked *asked)
{
	struct query_key key = { .socket_cookie = bpf_get_socket_cookie(skb), .id = id };
	struct query *query = bpf_map_lookup_elem(&dns_queries, &key);

	if (!query || !query->since_ns)
		return false;
	asked->since_ns = query->since_ns;
	asked->cgroup_id = query->cgroup_id;
	asked->pid = query->pid;
	asked->tid = query->tid;
	asked->query_type = query->query_type;
	__builtin_memcpy(asked->name, query->question + 1, DNS_NAME_BYTES);
	return (int)bpf_map_delete_elem(&dns_queries, &key) == 0;
}

static __always_inline void sum_up_lookup(u64 cgroup, u64 ns)
{
	struct histogram_sums none = {}, *sums;
	bool is_new;

	if (!kind_is_on(KIND_HISTOGRAM))
		return;
	sums = aggregate_sum(dns_latency, &cgroup, &none, &is_new);
	if (sums)
		histogram_add(sums, ns);
	else
		count_unsummed(KIND_HISTOGRAM);
}

/* An answer, or what comes from port 53 in place of one: its message begins at `offset`. */
static __always_inline void dns_answer(struct __sk_buff *skb, u32 offset)
{
	struct tuning *tuning = tuned();
	struct asked asked = {};
	struct dns_record *record;
	struct dns_header header;
	u64 ns;

	if (!tuning || bpf_skb_load_bytes(skb, offset, &header, sizeof(header)))
		return;
	if (!(header.flags & IS_ANSWER) || !take_query(skb, header.id, &asked))
		return;
	ns = bpf_ktime_get_boot_ns() - asked.since_ns;
	sum_up_lookup(asked.cgroup_id, ns);
	if (!(header.rcode & 0xf) && ns < *(volatile u64 *)&tuning->dns_slow_ns)
		return;
	record = bulk_begin(KIND_DNS, sizeof(*record));
	if (!record)
		return;
	record->header.cgroup_id = asked.cgroup_id;
	record->header.pid = asked.pid;
	record->header.tid = asked.tid;
	record->latency_ns = ns;
	record->rcode = header.rcode & 0xf;
	record->query_type = asked.query_type;
	__builtin_memcpy(record->name, asked.name, DNS_NAME_BYTES);
	bulk_end(record);
}
