/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Which rules of a legacy table (ip_tables, ip6_tables) a packet matched, from
 * the table's own counters.
 *
 * ipt_do_table adds one to the per-CPU counter of exactly the entries that TRACE
 * would log. So the counters of this CPU are copied when the function begins
 * (a "run" opens) and compared when it returns; the entries that grew are sent to
 * user space, which knows the table's structure and tells order and names.
 *
 * The function evaluates with bottom halves off, but is entered and left as its
 * caller runs. In process context (local output) other runs may therefore
 * fall between the two probes: softirq packets nest, and under full preemption
 * other tasks' runs overlap. What keeps the result exact:
 *
 *  - xt_recseq, the kernel's own per-CPU sequence count of evaluations, tells how
 *    many fell between entry and exit, whether our probes saw them or not. Two
 *    steps: only this packet's own. It also tells if one fell into our copying.
 *  - A run with bottom halves off cannot be disturbed. What it counted is added
 *    to the snapshots of the runs that are open around it (it nests in them), so
 *    that they never see it. To that end it is copied even if nobody follows its
 *    packet.
 *  - Runs that were disturbed by other tasks' are marked REC_F_SHARED and resolved,
 *    or not, by user space; REC_FOREIGN gives it those that are not followed.
 */
#ifndef NFTRACE_XT_H
#define NFTRACE_XT_H

#include "maps.h"
#include "compat.h"
#include "packet.h"

#define BLOCK	   256 /* counters in a per-CPU allocation of 4096 bytes */
#define MAX_BLOCKS 256 /* 65,536 entries */
#define RUNS	   8   /* runs open at once on a CPU, per family */
#define TRIES	   3   /* to copy the counters while nobody changes them */
#define STALE_NS   1000000000ULL

enum family { FAM_IP, FAM_IP6, FAM_MAX };

/*
 * The kernel skips a program that is hit while it runs on the same CPU. A softirq that
 * interrupts a task's probe hits the same function; so each probe is there twice, for
 * tasks and for what runs with bottom halves off, and only one of them does anything.
 * Where tasks preempt each other in the kernel, a spare one for tasks is attached
 * besides: whichever of the two comes first does the work.
 */
enum context { CTX_TASK, CTX_SPARE, CTX_BH, CTX_MAX };

struct xt_counters {
	u64 pcnt; /* in an entry on SMP: the per-CPU pointer */
	u64 bcnt;
};

/* One generation of one table, by the address of its xt_table_info. */
struct xt_tab {
	u64 gen;
	u64 entries; /* address of the first entry */
	u32 number;  /* of entries */
	u32 blocks;
	char name[32];
	u64 base[MAX_BLOCKS]; /* per-CPU pointers of the counter blocks */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, u64);
	__type(value, struct xt_tab);
} xt_tables SEC(".maps");

enum { SCRATCH_LOOKUP = FAM_MAX * CTX_MAX, SCRATCH_MAX };

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SCRATCH_MAX);
	__type(key, u32);
	__type(value, struct xt_tab);
} xt_tab_scratch SEC(".maps");

/* A call of ipt_do_table between its two probes. */
struct run {
	u64 ctx; /* names the call: its frame in the trampoline; 0: free */
	u64 private;
	u64 gen;
	u64 skb;
	u64 jid; /* 0: a packet that is not followed */
	u64 ts;
	u64 task;	/* 0 with bottom halves off */
	u64 migrations; /* of the task */
	u32 recseq;	/* xt_recseq after the snapshot */
	u32 flags;	/* REC_F_* */
	u32 wanted;	/* user space needs it even if not followed */
	u32 pad;
	struct pkt before;
};

struct runs {
	struct run r[RUNS];
	/* What the entry probe finds when it looks through r: see opaque(). */
	u32 free;   /* a free one; RUNS: none */
	u32 others; /* whether the same table is open already */
};

/* Index: CPU * FAM_MAX + family. Resized at load. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FAM_MAX);
	__type(key, u32);
	__type(value, struct runs);
} xt_runs SEC(".maps");

struct block {
	struct xt_counters c[BLOCK];
};

/*
 * The copied counters: snap_blocks blocks for each run. Resized at load. Index:
 * ((CPU * FAM_MAX + family) * RUNS + run) * snap_blocks + block.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct block);
} xt_snap SEC(".maps");

const volatile u32 snap_blocks = 1;

/* Set once all probes of a family are attached: until then they see halves. */
u32 xt_on[FAM_MAX] = {};

/* Number of runs open anywhere. */
u64 open_runs = 0;

/* What the exit probe works in. Index: family * CTX_MAX + context. */
struct xt_exit {
	struct rec_table rec;
	u32 slot; /* see opaque() */
	struct rec_pkt after;
	struct block now;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, FAM_MAX *CTX_MAX);
	__type(key, u32);
	__type(value, struct xt_exit);
} xt_exit_scratch SEC(".maps");

/*
 * struct ipt_entry and ip6t_entry (UAPI): the counters end the header, and
 * next_offset stands in the 16 bytes before them.
 */
struct xt_entry_tail {
	u16 before[8];
	struct xt_counters counters;
};

static __always_inline u32 tail_offset(u32 fam)
{
	return fam == FAM_IP6 ? 152 - 16 : 96 - 16;
}

static __always_inline u16 next_offset(u32 fam, const struct xt_entry_tail *t)
{
	return fam == FAM_IP6 ? t->before[3] : t->before[5];
}

/* ---- tables ---- */

struct tab_walk {
	struct xt_tab *tab;
	u64 at;
	u32 fam;
	u32 bad;
};

static long tab_walk_entry(u32 i, struct tab_walk *w)
{
	struct xt_entry_tail t;
	struct xt_tab *tab = w->tab;
	u16 next;

	if (bpf_probe_read_kernel(&t, sizeof(t),
				  (void *)(w->at + tail_offset(w->fam)))) {
		w->bad = 1;
		return 1;
	}
	if (i % BLOCK == 0)
		tab->base[bounded(i / BLOCK, MAX_BLOCKS - 1)] = t.counters.pcnt;
	next = next_offset(w->fam, &t);
	if (!next) {
		w->bad = 1;
		return 1;
	}
	w->at += next;
	return 0;
}

/*
 * The table at info, made known if it is new. NULL: it has more entries than
 * there is room for, or could not be read.
 */
static __always_inline struct xt_tab *tab_get(u64 info, struct xt_table *table,
					      u32 fam, u32 scratch)
{
	struct xt_tab *tab = bpf_map_lookup_elem(&xt_tables, &info);
	struct xt_table_info *ti = (void *)info;
	struct tab_walk w = {};

	if (tab)
		return tab;
	tab = bpf_map_lookup_elem(&xt_tab_scratch, &scratch);
	if (!tab)
		return NULL;
	tab->gen = bpf_ktime_get_ns();
	tab->number = BPF_CORE_READ(ti, number);
	tab->entries = (u64)&ti->entries;
	tab->blocks = (tab->number + BLOCK - 1) / BLOCK;
	if (!tab->number || tab->blocks > snap_blocks ||
	    tab->blocks > MAX_BLOCKS)
		return NULL;
	bpf_probe_read_kernel(tab->name, sizeof(tab->name), &table->name);
	if (nr_cpus > 1) {
		w.tab = tab;
		w.at = tab->entries;
		w.fam = fam;
		bpf_loop(tab->number, tab_walk_entry, &w, 0);
		if (w.bad)
			return NULL;
	}
	bpf_map_update_elem(&xt_tables, &info, tab, BPF_ANY);
	return bpf_map_lookup_elem(&xt_tables, &info);
}

/* ---- counters ---- */

struct copy {
	struct xt_tab *tab;
	struct xt_exit *x; /* comparing: where the hits go; NULL: copying */
	struct block *old; /* comparing: the block of the snapshot */
	u64 at;		   /* inline counters: the entry's address */
	u64 percpu;	   /* offset of this CPU's variables */
	u32 snap;	   /* index of the first block in xt_snap */
	u32 fam;
	u32 first; /* comparing: the entry of the block's first counter */
	u32 bad;
};

/* Notes an entry if it grew. */
static __always_inline void compare(struct rec_table *rec, u32 index,
				    struct xt_counters *now,
				    struct xt_counters *old)
{
	u32 n = rec->nhits;
	struct hit *h;

	if (now->pcnt == old->pcnt)
		return;
	rec->nhits = n + 1;
	if (n >= MAX_HITS)
		return;
	h = &rec->hits[n];
	h->index = index;
	h->packets = now->pcnt - old->pcnt;
	h->bytes = now->bcnt - old->bcnt;
}

#define BATCH 8 /* counters that are compared at a time */

static long compare_batch(u32 nr, struct copy *c)
{
	u64 first = bounded(nr, BLOCK / BATCH - 1) * BATCH, diff = 0;
	struct xt_exit *x = c->x;
	struct xt_counters *now = &x->now.c[first], *old = &c->old->c[first];

#pragma unroll
	for (int i = 0; i < BATCH; i++)
		diff |= now[i].pcnt ^ old[i].pcnt;
	if (!diff)
		return 0;
	for (int i = 0; i < BATCH; i++)
		if (c->first + first + i < c->tab->number)
			compare(&x->rec, c->first + first + i, &now[i],
				&old[i]);
	return 0;
}

/* Copies or compares a block of per-CPU counters. */
static long copy_block(u32 b, struct copy *c)
{
	struct xt_tab *tab = c->tab;
	u32 key = c->snap + b;
	u64 n;
	struct block *old = bpf_map_lookup_elem(&xt_snap, &key);
	struct xt_exit *x = c->x;
	void *src;

	if (!old || b >= MAX_BLOCKS)
		return 1;
	src = (void *)(tab->base[bounded(b, MAX_BLOCKS - 1)] + c->percpu);
	n = tab->number - b * BLOCK;
	if (n > BLOCK)
		n = BLOCK;
	n = bounded(n, 2 * BLOCK - 1);
	if (n > BLOCK)
		return 1;
	if (!x) {
		if (!bpf_probe_read_kernel(old, n * sizeof(old->c[0]), src))
			return 0;
		c->bad = 1;
		return 1;
	}
	if (bpf_probe_read_kernel(&x->now, n * sizeof(old->c[0]), src)) {
		c->bad = 1;
		return 1;
	}
	c->old = old;
	c->first = b * BLOCK;
	bpf_loop((n + BATCH - 1) / BATCH, compare_batch, c, 0);
	return 0;
}

/* The same for one entry of a table with inline counters (one CPU). */
static long copy_entry(u32 i, struct copy *c)
{
	u32 key = c->snap + i / BLOCK;
	struct block *old = bpf_map_lookup_elem(&xt_snap, &key);
	struct xt_exit *x = c->x;
	struct xt_entry_tail t;
	struct xt_counters *o;

	if (!old)
		return 1;
	if (bpf_probe_read_kernel(&t, sizeof(t),
				  (void *)(c->at + tail_offset(c->fam)))) {
		c->bad = 1;
		return 1;
	}
	c->at += next_offset(c->fam, &t);
	o = &old->c[i % BLOCK];
	if (!x)
		*o = t.counters;
	else
		compare(&x->rec, i, &t.counters, o);
	return 0;
}

static __always_inline bool copy_counters(struct copy *c)
{
	if (nr_cpus > 1) {
		c->percpu = (u64)this_cpu(0);
		bpf_loop(c->tab->blocks, copy_block, c, 0);
	} else {
		c->at = c->tab->entries;
		bpf_loop(c->tab->number, copy_entry, c, 0);
	}
	return !c->bad;
}

/* x_tables.h:xt_write_recseq_begin: odd while this CPU evaluates. */
static __always_inline u32 recseq(void)
{
	u32 seq = 0;
	void *p = this_cpu(sym_xt_recseq);

	if (p)
		bpf_probe_read_kernel(&seq, sizeof(seq), p);
	return seq;
}

/* ---- runs ---- */

/*
 * The index n, through memory, so that the verifier forgets which iteration of a loop
 * it came from. Otherwise it follows all that comes behind the loop once for each
 * iteration, which takes RUNS times as long.
 */
static __always_inline u64 opaque(u32 *mem, u32 n)
{
	*(volatile u32 *)mem = n;
	return bounded(*(volatile u32 *)mem, RUNS - 1);
}

static __always_inline bool run_open(struct run *r, u64 private, u64 now)
{
	return r->ctx && r->private == private && now - r->ts < STALE_NS;
}

/* A run that ends, and how it bears on those that are open around it. */
struct settle {
	struct runs *runs;
	struct run *r;
	struct rec_table *rec;
	u32 slot;
	u32 key; /* CPU * FAM_MAX + family */
	u32 snap;
};

/* Adds a hit to a snapshot, as if it had been there when it was taken. */
static long shift_hit(u32 nr, struct settle *s)
{
	struct hit *h = &s->rec->hits[bounded(nr, MAX_HITS - 1)];
	u32 key = s->snap + h->index / BLOCK;
	struct block *b = bpf_map_lookup_elem(&xt_snap, &key);
	struct xt_counters *c;

	if (!b)
		return 1;
	c = &b->c[h->index % BLOCK];
	c->pcnt += h->packets;
	c->bcnt += h->bytes;
	return 0;
}

#define REC_F_UNREADABLE                                                       \
	(REC_F_NOTABLE | REC_F_FAULT | REC_F_TORN | REC_F_REPLACED |           \
	 REC_F_MIGRATED)

static long settle_run(u32 nr, struct settle *s)
{
	u64 i = bounded(nr, RUNS - 1);
	struct run *o = &s->runs->r[i], *r = s->r;

	if (i == s->slot || !run_open(o, r->private, s->rec->hdr.ts))
		return 0;
	if (!(r->flags & REC_F_ATOMIC)) {
		/* Their order is not known here: user space finds out. */
		if (o->jid)
			r->wanted = 1;
		if (r->jid)
			o->wanted = 1;
	} else if (s->rec->hdr.flags & (REC_F_UNREADABLE | REC_F_TOOMANY)) {
		o->flags |= REC_F_TORN;
	} else {
		s->snap = (s->key * RUNS + i) * snap_blocks;
		bpf_loop(s->rec->nhits, shift_hit, s, 0);
	}
	return 0;
}

static __always_inline void run_close(struct run *r)
{
	r->ctx = 0;
	__sync_fetch_and_add(&open_runs, -1);
}

/* The entry probe. ctx names the call. */
static __always_inline void run_begin(void *ctx, u32 fam, enum context context,
				      struct xt_table *table,
				      struct sk_buff *skb,
				      struct nf_hook_state *state)
{
	u32 cpu = bpf_get_smp_processor_id(), key = cpu * FAM_MAX + fam;
	u64 frame = (u64)ctx, task = bpf_get_current_task(), private, now;
	struct copy c = {};
	struct journey *j;
	struct runs *runs;
	struct run *r;
	u64 slot;
	u32 seq;
	bool atomic;

	atomic = bh_off();
	if (atomic != (context == CTX_BH))
		return;
	j = journey_of(skb);
	if (!j && !open_runs && atomic)
		return;
	runs = bpf_map_lookup_elem(&xt_runs, &key);
	if (!runs)
		return;
	now = bpf_ktime_get_ns();
	private = (u64)BPF_CORE_READ(table, private);
	*(volatile u32 *)&runs->free = RUNS;
	*(volatile u32 *)&runs->others = 0;
	for (u32 i = 0; i < RUNS; i++) {
		r = &runs->r[i];
		/*
		 * The other one of the two probes for tasks was here, and
		 * nothing was evaluated since.
		 */
		if (!atomic && r->ctx == frame && r->skb == (u64)skb &&
		    r->jid == (j ? j->id : 0) && r->recseq == recseq())
			return;
		/*
		 * A call in the same frame, or of a task that can be in one
		 * only: the old one's exit was missed.
		 */
		if (r->ctx && (r->ctx == frame || now - r->ts >= STALE_NS ||
			       (!atomic && r->task == task)))
			run_close(r);
		if (!r->ctx)
			*(volatile u32 *)&runs->free = i;
		else if (r->private == private)
			*(volatile u32 *)&runs->others = 1;
	}
	if (!j && atomic && !*(volatile u32 *)&runs->others)
		return;
	slot = *(volatile u32 *)&runs->free;
	if (slot >= RUNS) {
		count_loss(LOSS_SLOTS);
		return;
	}
	slot = bounded(slot, RUNS - 1);
	r = &runs->r[slot];
	r->private = private;
	r->gen = 0;
	r->skb = (u64)skb;
	r->jid = j ? j->id : 0;
	r->ts = now;
	r->flags = atomic ? REC_F_ATOMIC : 0;
	r->recseq = recseq();
	r->wanted = 0;
	r->task = atomic ? 0 : task;
	r->ctx = frame;
	__sync_fetch_and_add(&open_runs, 1);
	if (j) {
		/* Entered anew, not left: the other probe, or a missed exit. */
		if (j->run && j->entered != frame) {
			j->seq++; /* a hole in the path */
			count_loss(LOSS_EXIT_MISSED);
		}
		j->entered = frame;
		j->run = key * RUNS + slot + 1;
		j->left = 0;
		read_pkt(&r->before, skb, state->net);
	}
	if (!atomic) {
		struct task_struct *t = (void *)task;

		r->migrations = BPF_CORE_READ(t, se.nr_migrations);
	}
	c.tab = tab_get(private, table, fam, fam * CTX_MAX + context);
	if (!c.tab) {
		r->flags |= REC_F_NOTABLE;
		return;
	}
	r->gen = c.tab->gen;
	c.snap = (key * RUNS + slot) * snap_blocks;
	c.fam = fam;
	/* A softirq may have run through the tables meanwhile: once more. */
	for (int i = 0; i < TRIES; i++) {
		seq = recseq();
		if (!copy_counters(&c))
			r->flags |= REC_F_FAULT;
		r->recseq = recseq();
		if (r->recseq == seq)
			return;
	}
	r->flags |= REC_F_TORN;
}

/* The exit probe. */
static __always_inline void run_end(void *ctx, u32 fam, enum context context,
				    struct xt_table *table, struct sk_buff *skb,
				    struct nf_hook_state *state, u32 verdict)
{
	u32 cpu = bpf_get_smp_processor_id(), key = cpu * FAM_MAX + fam;
	u64 frame = (u64)ctx, n;
	struct journey *j;
	struct copy c = {};
	struct rec_table *rec;
	struct xt_exit *x;
	struct runs *runs;
	struct run *r = NULL;
	u32 scratch = fam * CTX_MAX + context;
	bool changed = false;
	u64 slot;
	u32 seq;

	if (bh_off() != (context == CTX_BH))
		return;
	runs = bpf_map_lookup_elem(&xt_runs, &key);
	x = bpf_map_lookup_elem(&xt_exit_scratch, &scratch);
	if (!runs || !x)
		return;
	rec = &x->rec;
	j = journey_of(skb);
	for (slot = 0; slot < RUNS; slot++)
		if (runs->r[slot].ctx == frame)
			break;
	if (slot < RUNS) {
		slot = opaque(&x->slot, slot);
		r = &runs->r[slot];
	}
	if (r && (r->skb != (u64)skb || (j && r->jid != j->id))) {
		/* Not this call's: that one's exit was missed. */
		run_close(r);
		r = NULL;
	}
	if (!r && (!j || (!j->run && j->left == frame)))
		return; /* not followed, or the other probe was here */
	if (j)
		j->left = frame;
	rec->nhits = 0;
	rec_begin(&rec->hdr, j || r->jid ? REC_TABLE : REC_FOREIGN, j,
		  state->net);
	if (!j && r->jid) {
		/* Its packet ended within the table (stolen). */
		rec->hdr.jid = r->jid;
		rec->hdr.seq = ~0U;
	}
	rec->verdict = verdict;
	rec->private = (u64)BPF_CORE_READ(table, private);
	rec->gen = 0;
	bpf_probe_read_kernel(rec->table, sizeof(rec->table), &table->name);
	if (!r) {
		/* Entered elsewhere, or not seen to enter. */
		if (j->run) {
			u32 run = j->run - 1, k = run / RUNS;
			struct runs *rs = bpf_map_lookup_elem(&xt_runs, &k);

			if (rs && rs->r[run % RUNS].jid == j->id)
				run_close(&rs->r[run % RUNS]);
			rec->hdr.flags |= REC_F_MIGRATED;
		} else {
			rec->hdr.flags |= REC_F_MISSED_ENTRY;
		}
		j->run = 0;
		rec->entry_ts = rec->hdr.ts;
		read_place(&rec->place, skb, state);
		read_pkt(&rec->before, skb, state->net);
		goto send;
	}
	if (j)
		j->run = 0;
	rec->hdr.flags |= r->flags;
	rec->gen = r->gen;
	rec->entry_ts = r->ts;
	if (rec->private != r->private)
		rec->hdr.flags |= REC_F_REPLACED;
	rec->private = r->private;

	if (!(rec->hdr.flags & REC_F_UNREADABLE)) {
		u32 steps, again;

		c.tab = bpf_map_lookup_elem(&xt_tables, &r->private);
		if (!c.tab || c.tab->gen != r->gen) {
			rec->hdr.flags |= REC_F_REPLACED;
		} else {
			c.x = x;
			c.snap = (key * RUNS + slot) * snap_blocks;
			c.fam = fam;
			again = 1;
			for (int i = 0; i < TRIES && again; i++) {
				rec->nhits = 0;
				seq = recseq();
				if (!copy_counters(&c))
					rec->hdr.flags |= REC_F_FAULT;
				again = recseq() != seq;
			}
			if (again)
				rec->hdr.flags |= REC_F_TORN;
			steps = seq - r->recseq;
			if (!(r->flags & REC_F_ATOMIC)) {
				struct task_struct *t =
					(void *)bpf_get_current_task();

				if (steps == 0 ||
				    r->migrations !=
					    BPF_CORE_READ(t, se.nr_migrations))
					rec->hdr.flags |= REC_F_MIGRATED;
				else if (steps != 2)
					rec->hdr.flags |= REC_F_SHARED;
			}
		}
	}
	if (rec->nhits > MAX_HITS) {
		rec->nhits = MAX_HITS;
		rec->hdr.flags |= REC_F_TOOMANY;
	}

	if (open_runs > 1) {
		struct settle settle = {
			.runs = runs,
			.r = r,
			.rec = rec,
			.slot = slot,
			.key = key,
		};

		bpf_loop(RUNS, settle_run, &settle, 0);
	}
	if (rec->hdr.type == REC_FOREIGN && !r->wanted) {
		run_close(r);
		return;
	}

	read_place(&rec->place, skb, state);
	if (r->jid)
		rec->before = r->before;
	else
		read_pkt(&rec->before, skb, state->net);
	if (j && verdict != NF_STOLEN) {
		rec->hdr.flags |= REC_F_ALIVE;
		read_data(&x->after.pkt, skb);
		changed = !same_data(&x->after.pkt, &rec->before);
	}
	run_close(r);
send:
	n = bounded(rec->nhits, 2 * MAX_HITS - 1);
	if (n > MAX_HITS)
		return;
	rec_send(rec,
		 offsetof(struct rec_table, hits) + n * sizeof(struct hit));
	if (changed) {
		rec_begin(&x->after.hdr, REC_AFTER, j, state->net);
		read_pkt(&x->after.pkt, skb, state->net);
		rec_send(&x->after, sizeof(x->after));
	}
}

/*
 * A task that is preempted in the midst of a probe keeps others from being probed on this
 * CPU. Kernels that can be told not to (fc7566ad0a82 ("bpf: Introduce
 * bpf_preempt_[disable,enable] kfuncs"), 6.10) are told.
 */
extern void bpf_preempt_disable(void) __ksym __weak;
extern void bpf_preempt_enable(void) __ksym __weak;

static __always_inline void xt_enter(void *ctx, u32 fam, enum context context,
				     struct xt_table *table,
				     struct sk_buff *skb,
				     struct nf_hook_state *state)
{
	if (!live || !xt_on[fam])
		return;
	if (context != CTX_BH && bpf_preempt_disable)
		bpf_preempt_disable();
	run_begin(ctx, fam, context, table, skb, state);
	if (context != CTX_BH && bpf_preempt_disable)
		bpf_preempt_enable();
}

static __always_inline void xt_exit(void *ctx, u32 fam, enum context context,
				    struct xt_table *table, struct sk_buff *skb,
				    struct nf_hook_state *state, u32 verdict)
{
	if ((!live && !open_runs) || !xt_on[fam])
		return;
	if (context != CTX_BH && bpf_preempt_disable)
		bpf_preempt_disable();
	run_end(ctx, fam, context, table, skb, state, verdict);
	if (context != CTX_BH && bpf_preempt_disable)
		bpf_preempt_enable();
}

#endif
