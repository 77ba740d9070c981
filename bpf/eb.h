/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Which rules of ebtables' legacy tables a packet matched, from the tables' own counters.
 *
 * net/bridge/netfilter/ebtables.c:ebt_do_table adds one to this CPU's counter of each rule that
 * matches, and of nothing else: what a chain's policy did follows from its return value. A
 * table's counters are copied where the function is entered and compared where it is left, and
 * both run with bottom halves off, as the function itself does (a packet that comes back from
 * NFQUEUE is the exception, and not told of). So nobody runs through the table on this CPU in
 * between, but for calls from within: they take the place of the outer one, which is unresolved
 * then. There is one place for each CPU: a call whose end is not seen leaves nothing that
 * another could take for its own.
 */
#ifndef NFTRACE_EB_H
#define NFTRACE_EB_H

#include "maps.h"
#include "compat.h"
#include "packet.h"
#include "xt.h"
#include "nft.h"

/* Blocks of counters that a table may have: 4,096 rules. */
#define EBT_BLOCKS 16

/* Calls that set counters (ebtables -A restores them): begun, and over. */
u64 ebt_sets = 0;
u64 ebt_sets_over = 0;

/* One generation of one table, by the address of its ebt_table_info. */
struct ebt_tab {
	u64 gen;
	u64 table; /* struct ebt_table * */
};

/* One that is forgotten while it is in use gets another generation, and is read again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, u64);
	__type(value, struct ebt_tab);
} ebt_tables SEC(".maps");

/* The call of ebt_do_table that a CPU is in. */
struct ebt_call {
	u64 sp; /* where in the stack it is; 0: none that is told of */
	u64 table;
	u64 private; /* struct ebt_table_info * */
	u64 gen;
	u64 jid;
	u64 sets; /* ebt_sets */
	u64 at;	  /* of this CPU's counters */
	u32 seq;  /* of the journey */
	u32 number;
	u32 flags; /* REC_F_* */
	u32 pad;
};

struct ebt_work {
	struct ebt_call call;
	struct rec_ebt rec;
	struct hit spill[MAX_HITS]; /* so that the verifier sees rec.hits end */
	struct block now;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct ebt_work);
} ebt_works SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, EBT_BLOCKS);
	__type(key, u32);
	__type(value, struct block);
} ebt_snap SEC(".maps");

static __always_inline u64 ebt_private(u64 table)
{
	return read_u64(table +
			bpf_core_field_offset(struct ebt_table, private));
}

/* The generation of a table; 0: none is known, and none could be noted. */
static __always_inline u64 ebt_gen(u64 table, u64 private)
{
	struct ebt_tab new = {}, *tab;

	tab = bpf_map_lookup_elem(&ebt_tables, &private);
	if (tab && tab->table == table)
		return tab->gen;
	new.gen = bpf_ktime_get_ns();
	new.table = table;
	/* Not instead of what another CPU noted meanwhile: there is one generation. */
	bpf_map_update_elem(&ebt_tables, &private, &new,
			    tab ? BPF_EXIST : BPF_NOEXIST);
	tab = bpf_map_lookup_elem(&ebt_tables, &private);
	/* The reader is woken for a new one, which it has to read before it is replaced. */
	wake_reader = 1;
	return tab && tab->table == table ? tab->gen : 0;
}

static __always_inline struct ebt_work *ebt_work(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&ebt_works, &zero);
}

struct ebt_sweep {
	struct ebt_work *w;
	struct block *old;
	u32 from; /* the rule of the block's first counter */
};

static long ebt_copy(u32 b, struct ebt_sweep *s)
{
	struct block *to = bpf_map_lookup_elem(&ebt_snap, &b);
	u64 n = s->w->call.number - b * BLOCK;

	if (!to)
		return 1;
	n = n >= BLOCK ? BLOCK : bounded(n, BLOCK - 1);
	if (bpf_probe_read_kernel(to, n * sizeof(struct xt_counters),
				  (void *)(s->w->call.at + b * sizeof(*to))))
		s->w->call.flags |= REC_F_FAULT;
	return 0;
}

static long ebt_compare_one(u32 i, struct ebt_sweep *s)
{
	u64 at = bounded(i, BLOCK - 1), n;
	struct rec_ebt *r = &s->w->rec;
	struct xt_counters *old = &s->old->c[at], *now = &s->w->now.c[at];
	u64 packets = now->pcnt - old->pcnt;
	struct hit *h;

	if (!packets)
		return 0;
	n = bounded(r->nhits, MAX_HITS - 1);
	h = &r->hits[n];
	r->nhits++;
	h->index = s->from + at;
	h->table = 0;
	h->packets = packets;
	h->bytes = now->bcnt - old->bcnt;
	if (packets >> 16)
		s->w->call.flags |= REC_F_TOOMANY;
	return 0;
}

#ifdef NFTRACE_KPROBE
/* The same, looked at once by the verifier, which follows each round. */
__verified_once int ebt_compare_at(u32 i, u32 b)
{
	struct ebt_sweep s = { .from = b * BLOCK };

	s.w = ebt_work();
	s.old = bpf_map_lookup_elem(&ebt_snap, &b);
	return !s.w || !s.old || ebt_compare_one(i, &s);
}

#define ebt_compare_one(i, s) ebt_compare_at(i, (s)->from / BLOCK)
#endif

static long ebt_compare(u32 b, struct ebt_sweep *s)
{
	u64 n = s->w->call.number - b * BLOCK;

	s->old = bpf_map_lookup_elem(&ebt_snap, &b);
	if (!s->old)
		return 1;
	s->from = b * BLOCK;
	n = n >= BLOCK ? BLOCK : bounded(n, BLOCK - 1);
	if (bpf_probe_read_kernel(
		    &s->w->now, n * sizeof(struct xt_counters),
		    (void *)(s->w->call.at + b * sizeof(struct block))))
		s->w->call.flags |= REC_F_FAULT;
	else
		loop(n, BLOCK, ebt_compare_one, s);
	return 0;
}

#ifdef NFTRACE_KPROBE
/* The same, looked at once by the verifier, for each of many blocks. */
__verified_once int ebt_compare_block(u32 b)
{
	struct ebt_sweep s = {};

	s.w = ebt_work();
	return !s.w || ebt_compare(b, &s);
}

#define ebt_compare(b, s) ebt_compare_block(b)
#endif

/* A packet enters a table. sp names the call. */
static __always_inline int ebt_enter(u64 sp, u64 table, struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);
	struct ebt_sweep s = {};
	struct ebt_work *w;
	struct ebt_call *c;
	u64 number;

	/* Before all of the probes are there, tables may be replaced unseen. */
	if (!live || !ebt_on)
		return 0;
	w = ebt_work();
	if (!w)
		return 0;
	c = &w->call;
	c->sp = 0;
	if (!j || !j->frame || !bh_off(this_cpu()))
		return 0;
	c->sets = ebt_sets;
	c->flags = 0;
	c->table = table;
	c->private = ebt_private(table);
	c->gen = ebt_gen(table, c->private);
	c->jid = j->id;
	c->seq = j->seq;
	number = read_u32(
		c->private +
		bpf_core_field_offset(struct ebt_table_info, nentries));
	c->number = number;
	if (number && c->sets != ebt_sets_over)
		c->flags = REC_F_TORN;
	/* COUNTER_BASE */
	c->at = c->private +
		bpf_core_field_offset(struct ebt_table_info, counters) +
		((number * sizeof(struct xt_counters) + 63) & ~63ULL) *
			bpf_get_smp_processor_id();
	s.w = w;
	if (number > EBT_BLOCKS * BLOCK)
		c->flags |= REC_F_NOTABLE;
	else if (number)
		loop((number + BLOCK - 1) / BLOCK, EBT_BLOCKS, ebt_copy, &s);
	c->sp = sp;
	return 0;
}

/* It leaves it; nothing has become of it yet, whatever the verdict is. */
static __always_inline int ebt_leave(u64 sp, u64 table, struct sk_buff *skb,
				     u8 hook, u32 verdict)
{
	struct journey *j = journey_of(skb);
	struct ebt_sweep s = {};
	struct ebt_tab *tab;
	struct rec_ebt *r;
	struct ebt_work *w;
	struct ebt_call *c;
	struct frame *f;
	u64 private, n;

	if (!j || !ebt_on)
		return 0;
	f = frame_of(j);
	w = ebt_work();
	/* The hook's probe was skipped, or it is behind a queue of another kind than NFQUEUE's. */
	if (!w || !f)
		return 0;
	c = &w->call;
	r = &w->rec;
	r->nhits = 0;
	private = ebt_private(table);
	if (c->sp != sp || c->table != table || c->jid != j->id ||
	    c->seq != j->seq) {
		c->flags = REC_F_NOENTRY;
		c->private = private;
		c->gen = ebt_gen(table, private);
	} else if (c->number && !c->flags) {
		s.w = w;
		loop((c->number + BLOCK - 1) / BLOCK, EBT_BLOCKS, ebt_compare,
		     &s);
		if (r->nhits > MAX_HITS) {
			r->nhits = 0;
			c->flags |= REC_F_TOOMANY;
		}
	}
	/* If it is the table now, it was in between. */
	tab = bpf_map_lookup_elem(&ebt_tables, &private);
	if (private != c->private || !tab || tab->gen != c->gen)
		c->flags |= REC_F_REPLACED;
	if (c->number && c->sets != ebt_sets)
		c->flags |= REC_F_TORN;
	c->sp = 0;
	nft_packet(f, j, skb, only_on(ON_EBT), 0);
	f->nft = 1;
	f->nft_base = 0;
	rec_begin(&r->hdr, REC_EBT, j, NULL, bpf_ktime_get_ns(),
		  bpf_get_smp_processor_id());
	r->hdr.flags |= c->flags;
	r->hdr.netns = f->rec.hdr.netns;
	r->private = c->private;
	r->gen = c->gen;
	r->hook = hook;
	r->verdict = verdict;
	bpf_probe_read_kernel(
		r->name, sizeof(r->name),
		(void *)(table +
			 bpf_core_field_offset(struct ebt_table, name)));
	n = bounded(r->nhits, 2 * MAX_HITS - 1);
	if (n > MAX_HITS)
		return 0;
	rec_send(r, offsetof(struct rec_ebt, hits) + n * sizeof(struct hit));
	return 0;
}

#endif
