/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Which rules of legacy tables (ip_tables, ip6_tables, arp_tables) a packet matched, from
 * the tables' own counters.
 *
 * ipt_do_table (ip6t_do_table, arpt_do_table) adds one to the per-CPU counter of exactly the entries that TRACE
 * would log, and it runs only within nf_hook_slow. So when a followed packet enters a
 * hook (a "frame" opens), this CPU's counters of all tables of that hook are copied;
 * when the packet appears anywhere else, they are compared. The entries that grew are
 * sent to user space, which knows the tables' structure and tells order and names.
 *
 * A frame has the CPU only while nobody else does. It is stopped, which means compared,
 * and started again, which means copied anew,
 *
 *  - where another packet enters a hook, on top of it in the same stack (the reply that
 *    REJECT sends) or in a softirq; it goes on when that one has left or at the softirq's
 *    end;
 *  - where the scheduler takes the CPU from its task, and where it gives one back,
 *    maybe another one.
 *
 * xt_recseq, the kernel's own per-CPU count of evaluations, tells whether anything was
 * missed: the record says how many tables were run through while the frame had the CPU,
 * and user space compares that with the tables whose rules grew.
 */
#ifndef NFTRACE_XT_H
#define NFTRACE_XT_H

#include "maps.h"
#include "compat.h"
#include "packet.h"
#include "filter.h"
#include "skipped.h"

#define BLOCK	   256 /* counters in a per-CPU allocation of 4096 bytes */
#define MAX_BLOCKS 256 /* 65,536 entries */

enum limits {
	FRAMES = 8, /* frames of a CPU */
	KEPT = 64,  /* tables of a CPU of which softirqs keep the counters */
};

struct xt_counters {
	u64 pcnt; /* in an entry on SMP: the per-CPU pointer */
	u64 bcnt;
};

struct block {
	struct xt_counters c[BLOCK];
};

/* Blocks that there is room for in a snapshot of all tables of a hook. */
const volatile u32 snap_blocks = 1;

/* ---- tables ---- */

/* One generation of one table, by the address of its xt_table_info. */
struct xt_tab {
	u64 gen;
	u64 entries; /* address of the first entry */
	u32 number;  /* of entries */
	u32 blocks;
	u32 slot; /* in kept */
	u32 pad;
	u64 base[MAX_BLOCKS]; /* per-CPU pointers of the counter blocks */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct xt_tab);
} xt_tables SEC(".maps");

/*
 * The probes, which each have their own space to work in: a softirq may interrupt one, and of
 * one program the kernel skips what would run within it. See only_on.
 */
enum on {
	ON_HOOK,
	ON_HOOK_TASK,
	ON_HOOK_BRIDGE,
	ON_REINJECT, /* these have a place in decisions each */
	ON_LOOKUP,
	ON_REPLACE,
	ON_XMIT,
	ON_BRIDGE,
	ON_PORT,
	ON_DELIVER,
	ON_DELIVER6,
	ON_NAT,
	ON_NAT_ICMP,
	ON_NAT_ICMP6,
	ON_DROP,
	ON_RELEASE,
	ON_SOFTIRQ,
	ON_SWITCH,
	ON_NFT,
	ON_NFT_TASK,
	ON_EBT,
	ON_DEFRAG,
	ON_DEFRAG6,
	ON_QUEUE,
	ON_REFUSED,
	ON_MAX
};

/* on, of which no other program may say so: the same label would be there twice. */
#define only_on(on)                                                            \
	({                                                                     \
		asm volatile(".Lonly_" #on ":");                               \
		on;                                                            \
	})

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, ON_MAX);
	__type(key, u32);
	__type(value, struct xt_tab);
} xt_tab_scratch SEC(".maps");

/*
 * struct xt_table begins alike in all kernels. The loader compares this with the type
 * information of module x_tables, which the probes in the kernel itself cannot use.
 */
struct xt_table_head {
	u64 next, prev; /* in the list of the namespace's tables */
	u32 valid_hooks;
	u32 pad;
	u64 private;
};

static __always_inline u64 table_private(u64 table)
{
	return read_u64(table + offsetof(struct xt_table_head, private));
}

/* What the loader knows of module x_tables once it is there. */
struct xt_layout {
	u32 on;		     /* until then there are no tables */
	u32 pernet_id;	     /* xt_pernet_id: of struct xt_pernet in net->gen */
	u32 name;	     /* offsets: in struct xt_table */
	u32 number, entries; /* in struct xt_table_info */
	u32 pad;
};

struct xt_layout xt = {};

/* Whether the probes of ebtables are attached. */
u32 ebt_on = 0;

/* Counts tables that were freed. */
u64 xt_frees = 0;

/* Counts tables that were made known. */
u64 xt_made = 0;

/*
 * struct ipt_entry, ip6t_entry and arpt_entry (UAPI): the counters end the header, and
 * next_offset stands in the 16 bytes before them.
 */
struct xt_entry_tail {
	u16 before[8];
	struct xt_counters counters;
};

static __always_inline u32 tail_offset(u32 pf)
{
	if (pf == NFPROTO_IPV4)
		return 96 - 16;
	return pf == NFPROTO_IPV6 ? 152 - 16 : 176 - 16;
}

static __always_inline u16 next_offset(u32 pf, const struct xt_entry_tail *t)
{
	return pf == NFPROTO_IPV4 ? t->before[5] : t->before[3];
}

struct tab_walk {
	u64 at;	   /* an entry; 0: it could not be read */
	u64 first; /* counter of the block */
	u32 pf;
	u32 pad;
};

static long tab_walk_entry(u32 i, struct tab_walk *w)
{
	struct xt_entry_tail t;
	u16 next;

	if (bpf_probe_read_kernel(&t, sizeof(t),
				  (void *)(w->at + tail_offset(w->pf)))) {
		w->at = 0;
		return 1;
	}
	if (!i)
		w->first = t.counters.pcnt;
	next = next_offset(w->pf, &t);
	w->at = next ? w->at + next : 0;
	return !next;
}

/*
 * Notes where the counters of a block are: b of a table under way, whose first entry is at at.
 * Returns where the next block's is, or 0.
 */
__verified_once u64 tab_walk_block(u32 on, u32 b, u64 at, u32 pf)
{
	struct tab_walk w = { .at = at, .pf = pf };
	struct xt_tab *tab;
	u32 n;

	tab = bpf_map_lookup_elem(&xt_tab_scratch, &on);
	if (!tab || b >= MAX_BLOCKS)
		return 0;
	n = tab->number - b * BLOCK;
	if (n > BLOCK)
		n = BLOCK;
	loop(n, BLOCK, tab_walk_entry, &w);
	tab->base[bounded(b, MAX_BLOCKS - 1)] = w.first;
	return w.at;
}

struct tab_blocks {
	u64 at;
	u32 on, pf;
};

static long tab_walk_next(u32 b, struct tab_blocks *w)
{
	w->at = tab_walk_block(w->on, b, w->at, w->pf);
	return !w->at;
}

/* All blocks of it; at is the first entry of all. Returns 0 if one could not be read. */
__verified_once u64 tab_walk(u32 on, u32 blocks, u64 at, u32 pf)
{
	struct tab_blocks w = { .at = at, .on = on, .pf = pf };

	loop(blocks, MAX_BLOCKS, tab_walk_next, &w);
	return w.at;
}

/*
 * The table at info, made known if it is new. NULL: it has more entries than
 * there is room for, or could not be read.
 */
static __noinline struct xt_tab *tab_make(u64 info, u32 pf, u32 on)
{
	struct xt_tab *tab;

	tab = bpf_map_lookup_elem(&xt_tab_scratch, &on);
	if (!tab)
		return NULL;
	tab->gen = bpf_ktime_get_ns();
	tab->number = 0;
	bpf_probe_read_kernel(&tab->number, sizeof(tab->number),
			      (void *)(info + xt.number));
	tab->entries = info + xt.entries;
	tab->blocks = (tab->number + BLOCK - 1) / BLOCK;
	/* Two may share one: then it is copied more often. */
	tab->slot = xt_made++ % KEPT;
	if (!tab->number || tab->blocks > snap_blocks ||
	    tab->blocks > MAX_BLOCKS)
		return NULL;
	if (nr_cpus > 1 && !tab_walk(on, tab->blocks, tab->entries, pf))
		return NULL;
	/* Not instead of what a softirq made known meanwhile: there is one generation. */
	bpf_map_update_elem(&xt_tables, &info, tab, BPF_NOEXIST);
	return bpf_map_lookup_elem(&xt_tables, &info);
}

/* ---- frames ---- */

struct frame_table {
	u64 table; /* struct xt_table * */
	u64 at; /* of a single block its per-CPU pointer; inline: the first entry */
	u32 number;
	u32 blocks;
	u32 snap; /* number of its first block in the frame's snapshot */
	u32 slot; /* in kept */
};

#define FRAME_NOBODYS (~0ULL)

/* A call of nf_hook_slow for a followed packet, or of what is left of it behind a queue. */
struct frame {
	u64 sp; /* where in the stack the call is; 0: free */
	u64 task; /* whose stack; 0: a softirq's; FRAME_NOBODYS: it opens or ends */
	u64 skb;
	u64 jid;
	u64 net;   /* struct net * */
	u64 frees; /* xt_frees when it opened */
	u32 cpu;
	u32 recseq;  /* when it got the CPU */
	u32 epoch;   /* counts stops and starts */
	u32 stops;   /* counts those alone */
	u32 copied;  /* its snapshot is what the counters were at recseq */
	u32 split;   /* number of parts that nf_nat_manip_pkt has ended */
	u32 morphed; /* its packet is another one now than the tables saw */
	u32 refused; /* by a queue, and told until then: the packet may go on */
	u64 had_sp;  /* sp and task, before it was to be queued */
	u64 had_task;
	u32 first; /* its record has the packet, as has the first one of its journey */
	u32 blocks; /* used of its snapshot */
	u32 fresh;  /* one of its tables was met for the first time */
	u32 kept; /* its tables' counters are in kept, not in a snapshot of its own */
	u32 nft;	 /* nf_tables or ebtables did something with it */
	u32 nft_changed; /* since the call, and is as nft_pkt has it */
	u32 nft_cursor;	 /* net->nft.gencursor when nf_tables was seen last */
	u64 nft_base;	 /* the base chain that nf_tables is in; 0: none */
	u64 flowtable; /* struct nf_flowtable * that the packet is in; 0: none */
	u64 percpu;    /* where->percpu of the CPU that skipped is of */
	u64 skipped[NFT_COPIES]; /* nft_count_skipped() when it came there */
	u32 nft_missed; /* a bit for each copy that was skipped before that */
	/* What nf_tables called the probe with last; no base chain: it has not yet. */
	u64 nft_rule, nft_basechain;
	u32 nft_type;
	u64 slots; /* a bit for each that its tables have there */
	struct pkt nft_pkt;
	struct frame_table tables[MAX_TABLES];
	struct rec_hook rec;
	struct hit spill[MAX_HITS]; /* so that the verifier sees rec.hits end */
};

/* Index: CPU * FRAMES + number. Resized at load. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FRAMES);
	__type(key, u32);
	__type(value, struct frame);
} frames SEC(".maps");

/*
 * The copied counters: snap_blocks blocks for each frame, then KEPT for each CPU. Resized at
 * load.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct block);
} xt_snap SEC(".maps");

/*
 * Softirqs of one CPU do not interrupt each other. So they keep what they read last of a
 * table's counters, which is what the counters are as long as nobody runs through the table
 * here: xt_recseq has not moved, or each run since is accounted for (struct cpu). Tasks
 * copy all anew for each frame.
 */
struct kept {
	u64 private; /* struct xt_table_info * */
	u64 gen;
	u64 chain; /* cpu.chain when it was copied */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, KEPT);
	__type(key, u32);
	__type(value, struct kept);
} kept SEC(".maps");

struct cpu {
	u32 running; /* 1 + the frame that has the CPU; 0: none */
	u32 next;    /* where to look for a free frame */
	/*
	 * What is kept holds at this xt_recseq if it was copied in this chain of runs that are
	 * accounted for. One of long ago may be the same number by chance.
	 */
	u64 chain;
	u64 when; /* CLOCK_MONOTONIC, ns */
	u32 recseq;
	u32 pad;
	u64 percpu; /* this_cpu(), once somebody has asked; else 0 */
};

#define CHAIN_NS 1000000000

/* Index: CPU. Resized at load. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct cpu);
} cpus SEC(".maps");

/* On which CPU a task last opened a frame: CPU * FRAMES. Tasks go, and nobody tells. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, u64);
	__type(value, u32);
} task_frames SEC(".maps");

/* Numbers of frames that are open: all, and those of tasks. */
u64 open_frames = 0;
u64 open_task_frames = 0;

/* Where a probe runs that is to stop, to start or to end frames. */
struct where {
	struct cpu *c;
	u64 task;   /* whose stack; 0: a softirq's */
	u64 now;    /* CLOCK_MONOTONIC, ns */
	u64 percpu; /* offset of this CPU's variables */
	u32 cpu;
	u32 on; /* enum on */
};

static __always_inline struct frame *frame_at(u32 n)
{
	u32 key = n - 1;

	return n ? bpf_map_lookup_elem(&frames, &key) : NULL;
}

/* The frame of the hook that a packet is in, NULL if none is known. */
static __always_inline struct frame *frame_of(const struct journey *j)
{
	struct frame *f = frame_at(j->frame);

	return f && f->jid == j->id ? f : NULL;
}

/* 0, which the verifier must not know: it would follow softirqs apart from tasks. */
u64 no_task = 0;

static __always_inline bool where_am_i(struct where *w, enum on on)
{
	w->on = on;
	w->now = bpf_ktime_get_ns();
	w->cpu = bpf_get_smp_processor_id();
	w->c = bpf_map_lookup_elem(&cpus, &w->cpu);
	if (!w->c)
		return false;
	w->percpu = w->c->percpu;
	if (!w->percpu)
		w->percpu = w->c->percpu = this_cpu();
	w->task = in_softirq(w->percpu) ? no_task : bpf_get_current_task();
	return true;
}

/* x_tables.h:xt_write_recseq_begin: odd while this CPU evaluates. */
static __always_inline u32 recseq(u64 percpu)
{
	return read_u32(percpu + sym_xt_recseq);
}

/* The same where it may cost: the kernel loads programs with less code faster. */
__verified_once u32 recseq_again(u64 percpu)
{
	return recseq(percpu);
}

/* ---- counters ---- */

/*
 * How far a pass over the counters of a frame's tables has come: in a map's memory, where
 * the verifier does not follow each value.
 */
struct cursor {
	u64 entry; /* inline counters: the next entry's address */
	u32 table;
	u32 block; /* of the table */
	u32 from;  /* the entry of the block's first counter */
	u32 nhits;
	u32 bad;    /* REC_F_* */
	u32 hit;    /* a bit for each table whose rules grew */
	u32 mode;   /* enum sweep_mode */
	u32 snap;   /* index of the frame's first block in xt_snap */
	u32 kept;   /* index of the CPU's first kept block there */
	u32 number; /* of counters in the block */
	u64 at;	    /* address of the block's counters on this CPU */
	u64 percpu; /* offset of this CPU's variables */
	u64 chain;  /* of the CPU */
};

/* The space that a probe works in: see enum on. */
struct scratch {
	struct cursor c;
	struct rec_pkt after;
	struct block now; /* what a comparison reads a block into */
	/* What a comparison found, until it is known that nothing came in between. */
	struct hit found[MAX_HITS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, ON_MAX);
	__type(key, u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

enum sweep_mode {
	SWEEP_COPY,
	SWEEP_COMPARE,
	SWEEP_UPDATE, /* compare, and keep what is found */
};

/* One pass. */
struct sweep {
	struct frame *f;
	struct scratch *s;
	u32 n, on;
};

/* One block of it. */
struct block_sweep {
	struct frame *f;
	struct scratch *s;
	struct block *old;
	u32 n, on;
	u32 key; /* of old in xt_snap */
};

/*
 * Notes an entry if it grew. Behind MAX_HITS it begins anew, which user space never sees
 * (REC_F_TOOMANY): one way through the code is all that the verifier has to follow.
 */
static __always_inline void compare(struct block_sweep *b, u32 index, u64 pcnt,
				    u64 bcnt, struct xt_counters *old)
{
	u64 packets = pcnt - old->pcnt, bytes = bcnt - old->bcnt, n;
	struct cursor *c = &b->s->c;
	struct hit *h;

	if (!packets)
		return;
	n = bounded(c->nhits, MAX_HITS - 1);
	c->nhits++;
	h = &b->s->found[n];
	if (c->mode == SWEEP_UPDATE) {
		h = &b->f->rec.hits[n];
		old->pcnt = pcnt;
		old->bcnt = bcnt;
	}
	h->index = index;
	h->table = c->table;
	h->packets = packets;
	h->bytes = bytes;
	c->hit |= 1U << c->table;
	if (packets >> 16)
		c->bad |= REC_F_TOOMANY;
}

#define BATCH 8 /* counters that are compared at a time */

static long compare_batch(u32 nr, struct block_sweep *b)
{
	u64 first = bounded(nr, BLOCK / BATCH - 1) * BATCH;
	struct xt_counters *old = &b->old->c[first];
	const struct many_words *now = (void *)&b->s->now.c[first];

	if (has_rdonly_cast)
		now = words_at((void *)(b->s->c.at + first * sizeof(*old)));
#pragma unroll
	for (int i = 0; i < BATCH; i++)
		compare(b, b->s->c.from + first + i, now->w[2 * i],
			now->w[2 * i + 1], &old[i]);
	return 0;
}

/* Inline counters (one CPU): copies or compares one entry's. */
static long sweep_entry(u32 i, struct block_sweep *b)
{
	u32 pf = b->f->rec.place.pf;
	struct cursor *c = &b->s->c;
	struct xt_entry_tail t;
	struct xt_counters *o;

	if (bpf_probe_read_kernel(&t, sizeof(t),
				  (void *)(c->entry + tail_offset(pf)))) {
		c->bad |= REC_F_FAULT;
		return 1;
	}
	c->entry += next_offset(pf, &t);
	o = &b->old->c[bounded(i, BLOCK - 1)];
	if (c->mode == SWEEP_COPY)
		*o = t.counters;
	else
		compare(b, c->from + i, t.counters.pcnt, t.counters.bcnt, o);
	return 0;
}

#ifdef NFTRACE_KPROBE
/* The same, looked at once by the verifier, which follows each round. */
__verified_once int sweep_part(u32 i, u32 n, u32 on, u32 key)
{
	struct block_sweep b = {};

	b.f = frame_at(n);
	b.s = bpf_map_lookup_elem(&scratches, &on);
	b.old = bpf_map_lookup_elem(&xt_snap, &key);
	if (!b.f || !b.s || !b.old)
		return 1;
	return nr_cpus == 1 ? sweep_entry(i, &b) : compare_batch(i, &b);
}

#define sweep_entry(i, b)   sweep_part(i, (b)->n, (b)->on, (b)->key)
#define compare_batch(i, b) sweep_entry(i, b)
#endif

/* Whether what is kept of a table is what its counters are. */
static __always_inline bool kept_holds(const struct kept *k,
				       const struct hook_table *ht, u64 chain)
{
	return k->chain == chain && k->private == ht->private &&
	       k->gen == ht->gen;
}

/* Copies or compares one block of counters, and goes on to the next. */
static long sweep_block(u32 nr, struct sweep *s)
{
	struct block_sweep part = {
		.f = s->f, .s = s->s, .n = s->n, .on = s->on
	};
	struct cursor *c = &s->s->c;
	struct frame *f = s->f;
	u64 t = bounded(c->table, 7), n, up, at, private;
	u32 key, b = c->block;
	struct frame_table *ft;
	struct hook_table *ht;

	if (t >= f->rec.ntables || t >= MAX_TABLES)
		return 1;
	ft = &f->tables[t];
	ht = &f->rec.tables[t];
	private = ht->private;
	if (f->kept) {
		struct kept *k;

		key = ft->slot;
		k = bpf_map_lookup_elem(&kept, &key);
		if (!k)
			return 1;
		if (c->mode == SWEEP_COPY) {
			k->private = private;
			k->gen = ht->gen;
			k->chain = c->chain;
		}
		key = c->kept + ft->slot;
	} else {
		key = c->snap + ft->snap + b;
	}
	part.key = key;
	part.old = bpf_map_lookup_elem(&xt_snap, &key);
	if (!part.old)
		return 1;
	at = ft->at;
	if (ft->blocks > 1 || f->frees != xt_frees) {
		struct xt_tab *tab = bpf_map_lookup_elem(&xt_tables, &private);

		if (!tab || tab->gen != ht->gen) {
			c->bad |= REC_F_REPLACED;
			return 1;
		}
		at = tab->base[bounded(b, MAX_BLOCKS - 1)];
	}
	n = ft->number - b * BLOCK;
	if (n > BLOCK)
		n = BLOCK;
	/* Through memory, so that the verifier need not follow both. */
	*(volatile u32 *)&c->number = n;
	n = *(volatile u32 *)&c->number;
	/* What is behind the last counter is the table's, too, and never changes. */
	up = bounded(n + BATCH - 1, 2 * BLOCK - BATCH);
	if (up > BLOCK)
		return 1;
	c->from = b * BLOCK;
	c->at = at + c->percpu;
	if (nr_cpus == 1) {
		if (!b)
			c->entry = ft->at;
		loop(n, BLOCK, sweep_entry, &part);
	} else if ((c->mode == SWEEP_COPY || !has_rdonly_cast) &&
		   bpf_probe_read_kernel(
			   c->mode == SWEEP_COPY ? part.old : &s->s->now,
			   up * sizeof(struct xt_counters), (void *)c->at)) {
		c->bad |= REC_F_FAULT;
	} else if (c->mode != SWEEP_COPY) {
		loop(up / BATCH, BLOCK / BATCH, compare_batch, &part);
	}
	c->block = b + 1;
	if (c->block < ft->blocks)
		return 0;
	/* If it is the table now, it was when the counters were read. */
	if (c->mode != SWEEP_COPY && table_private(ft->table) != private)
		c->bad |= REC_F_REPLACED;
	c->block = 0;
	c->table++;
	return 0;
}

#ifdef NFTRACE_KPROBE
/* The same, looked at once by the verifier, for each of many blocks. */
__verified_once int sweep_next(u32 n, u32 on)
{
	struct sweep s = { .n = n, .on = on };

	s.f = frame_at(n);
	s.s = bpf_map_lookup_elem(&scratches, &on);
	return !s.f || !s.s || sweep_block(0, &s);
}

#define MAX_SNAP_BLOCKS 4096
#endif

/*
 * Compares the counters of frame n's tables, or copies them. What is found comes behind
 * the frame's hits, if what is kept is updated: else it is not sure yet.
 */
__verified_once int sweep(u32 n, u32 on, u32 mode)
{
	struct sweep s = {};
	struct cursor *c;
	struct cpu *cpu;
	u32 key;

	s.f = frame_at(n);
	s.s = bpf_map_lookup_elem(&scratches, &on);
	if (!s.f || !s.s)
		return 0;
	key = s.f->cpu;
	cpu = bpf_map_lookup_elem(&cpus, &key);
	if (!cpu)
		return 0;
	c = &s.s->c;
	c->chain = cpu->chain;
	c->snap = (n - 1) * snap_blocks;
	c->kept = nr_cpus * FRAMES * snap_blocks + key * KEPT;
	c->mode = mode;
	c->table = 0;
	c->block = 0;
	c->percpu = this_cpu();
#ifndef NFTRACE_KPROBE
	bpf_loop(snap_blocks, sweep_block, &s, 0);
#else
#pragma nounroll
	for (u32 i = 0; i < MAX_SNAP_BLOCKS && i < snap_blocks; i++)
		if (sweep_next(n, on))
			break;
#endif
	return 0;
}

/* Whether all is kept that the frame is to be compared with. */
__verified_once_mem int all_kept(const struct frame *f, u64 chain)
{
	u64 n;
	u32 slot;

	if (!f)
		return false;
	n = f->rec.ntables;
#pragma nounroll
	for (u64 i = 0; i < MAX_TABLES; i++) {
		struct kept *k;

		if (i >= n)
			break;
		slot = f->tables[i].slot;
		k = bpf_map_lookup_elem(&kept, &slot);
		if (!k || !kept_holds(k, &f->rec.tables[i], chain))
			return false;
	}
	return true;
}

/* The same for a frame of a softirq, whose tables' counters are kept. */
static __always_inline void frame_start_kept(struct where *w, struct frame *f,
					     u32 n, struct cursor *c, u32 seq)
{
	struct cpu *cpu = w->c;

	/* Odd: within another's run, which does not count. */
	if (seq != cpu->recseq || seq & 1 || w->now - cpu->when > CHAIN_NS)
		cpu->chain++;
	cpu->recseq = seq;
	cpu->when = w->now;
	c->bad = seq & 1 ? REC_F_UNCOUNTED : 0;
	/* A task has no business here. */
	if (w->task)
		c->bad |= REC_F_TORN;
	else if (!all_kept(f, cpu->chain))
		sweep(n, w->on, SWEEP_COPY);
	if (c->bad)
		cpu->chain++;
	f->rec.hdr.flags |= c->bad;
	f->recseq = seq;
	cpu->running = n;
}

/* The frame has the CPU from now on. */
static __noinline int frame_start(struct where *w, u32 n)
{
	struct frame *f = frame_at(n);
	struct scratch *s;
	struct cursor *c;
	u32 epoch, seq;

	s = bpf_map_lookup_elem(&scratches, &w->on);
	if (!f || !s)
		return 0;
	c = &s->c;
	epoch = f->epoch + 1;
	f->epoch = epoch;
	seq = recseq(w->percpu);
	if (f->kept) {
		f->cpu = w->cpu;
		frame_start_kept(w, f, n, c, seq);
		return 0;
	}
	/* Nobody ran through the tables here since the counters were copied. */
	if (f->copied && f->cpu == w->cpu && f->recseq == seq) {
		*(volatile u32 *)&w->c->running = n;
		if (recseq_again(w->percpu) != f->recseq)
			f->rec.hdr.flags |= REC_F_TORN;
		return 0;
	}
	f->copied = 0;
	f->cpu = w->cpu;
	if (!f->rec.ntables) {
		f->recseq = seq;
		w->c->running = n;
		return 0;
	}
	c->bad = 0;
	sweep(n, w->on, SWEEP_COPY);
	/*
	 * At the end of a softirq that came meanwhile this was done anew. But what was read before
	 * it came may have been stored behind that.
	 */
	if (f->epoch != epoch) {
		epoch = f->epoch;
		seq = recseq_again(w->percpu);
		sweep(n, w->on, SWEEP_COPY);
		if (f->epoch != epoch)
			c->bad |= REC_F_TORN;
	}
	f->recseq = seq;
	*(volatile u32 *)&w->c->running = n;
	if (recseq_again(w->percpu) != seq)
		c->bad |= REC_F_TORN;
	if (seq & 1)
		c->bad |= REC_F_UNCOUNTED;
	f->copied = !c->bad;
	f->rec.hdr.flags |= c->bad;
	return 0;
}

/* Number of a frame's tables in which rules grew: of the hits from one on. */
static __always_inline u32 tables_hit(struct cursor *c)
{
	u32 hit = c->hit, n = 0;

#pragma unroll
	for (int i = 0; i < MAX_TABLES; i++) {
		if (!hit)
			break;
		hit &= hit - 1;
		n++;
	}
	return n;
}

/* The same for a frame of a softirq, whose tables' counters are kept. */
static __always_inline bool frame_look_kept(struct where *w, struct frame *f,
					    u32 n, struct cursor *c, u32 seq)
{
	u32 began = f->recseq, runs;

	if (seq == began && !(seq & 1))
		return true;
	c->nhits = f->rec.nhits;
	c->bad = 0;
	c->hit = 0;
	sweep(n, w->on, SWEEP_UPDATE);
	if (c->nhits >= MAX_HITS)
		c->bad |= REC_F_TOOMANY;
	else
		f->rec.nhits = c->nhits;
	runs = (seq + 1) / 2 - (began + 1) / 2;
	f->rec.hdr.flags |= c->bad;
	f->rec.runs += runs;
	/*
	 * Each table that was run through is one of these, if there were not more runs than
	 * tables whose rules grew: what is kept of others holds as well.
	 */
	if (c->bad || (seq | began) & 1 || runs != tables_hit(c))
		w->c->chain++;
	w->c->recseq = seq;
	return true;
}

/* What a frame matched since it got the CPU. Returns whether that is sure. */
static __always_inline bool frame_look(struct where *w, struct frame *f, u32 n,
				       struct scratch *s)
{
	struct cursor *c = &s->c;
	u32 stops = f->stops, began = f->recseq, seq = recseq(w->percpu), now;
	u64 had, found;

	if (f->kept && !w->task)
		return frame_look_kept(w, f, n, c, seq);
	c->nhits = 0;
	c->bad = 0;
	now = seq;
	/* Odd: within another's run, which does not count. */
	if (seq != began || seq & 1) {
		sweep(n, w->on, SWEEP_COMPARE);
		now = recseq_again(w->percpu);
	}
	/* From here on a softirq that comes finds nothing to do. */
	*(volatile u32 *)&w->c->running = 0;
	/* One that came before has done all this itself. */
	if (*(volatile u32 *)&f->stops != stops)
		return recseq_again(w->percpu) == f->recseq;
	if (now != seq)
		return false;
	had = f->rec.nhits;
	found = c->nhits;
	if (had + found >= MAX_HITS) {
		c->bad |= REC_F_TOOMANY;
	} else if (found) {
		f->rec.nhits = had + found;
		had = bounded(had, MAX_HITS - 1);
		found = bounded(found, MAX_HITS - 1);
		bpf_probe_read_kernel(&f->rec.hits[had],
				      found * sizeof(struct hit), s->found);
	}
	f->rec.hdr.flags |= c->bad;
	f->rec.runs += (seq + 1) / 2 - (began + 1) / 2;
	return true;
}

/* Whatever frame has the CPU has it no more: what it matched is known now. */
static __noinline int frame_stop(struct where *w)
{
	u32 n = w->c->running;
	struct frame *f = frame_at(n);
	struct scratch *s;

	if (!f || !f->sp || f->cpu != w->cpu || !f->rec.ntables) {
		w->c->running = 0;
		return 0;
	}
	s = bpf_map_lookup_elem(&scratches, &w->on);
	if (!s)
		return 0;
	if (!frame_look(w, f, n, s))
		f->rec.hdr.flags |= REC_F_TORN;
	f->epoch++;
	f->stops++;
	w->c->running = 0;
	return 0;
}

/* ---- frames open and end ---- */

/* Sends at the time now what became known of a frame; skb, if not NULL, is still its packet. */
static __always_inline int send_frame(u64 now, u32 on, struct frame *f,
				      struct journey *j, struct sk_buff *skb)
{
	struct rec_hook *rec = &f->rec;
	u32 flags = rec->hdr.flags, netns = rec->hdr.netns;
	struct rec_pkt *after;
	struct scratch *s;
	u64 n;

	if (nft_stats[0] &&
	    nft_all_skipped(f->skipped, f->nft_missed, f->percpu))
		flags |= REC_F_NFTMISSED;
	if (f->morphed) {
		f->morphed = 0;
		skb = NULL;
	}
	rec_begin(&rec->hdr, REC_HOOK, j, NULL, now,
		  bpf_get_smp_processor_id());
	rec->hdr.flags |= flags;
	if (!skb)
		rec->hdr.flags |= REC_F_UNSEEN;
	else
		rec->hdr.flags |= nonzero(nfct_of(skb) & ~7UL) * REC_F_TRACKED;
	rec->hdr.netns = netns;
	if (f->split) {
		rec->hdr.flags |= REC_F_SPLIT;
		if (skb)
			read_pkt(&rec->before, skb, (void *)f->net);
		else
			rec->before.cap = 0;
	}
	if (!rec->ntables) {
		n = f->first || f->split || f->nft ?
			    offsetof(struct rec_hook, nhits) :
			    offsetof(struct rec_hook, before);
		rec_send(rec, n);
		if (!f->nft)
			return 0;
		n = 0;
	} else {
		n = bounded(rec->nhits, 2 * MAX_HITS - 1);
		if (n > MAX_HITS)
			return 0;
		if (f->fresh) {
			f->fresh = 0;
			wake_reader = 1;
		}
		rec_send(rec, offsetof(struct rec_hook, hits) +
				      n * sizeof(struct hit));
	}
	if (!skb || f->split || (!n && !f->nft))
		return 0;
	s = bpf_map_lookup_elem(&scratches, &on);
	if (!s)
		return 0;
	after = &s->after;
	read_data(&after->pkt, skb, number(get(skb, head)),
		  get(skb, network_header));
	if (same_data(&after->pkt, f->nft_changed ? &f->nft_pkt : &rec->before,
		      nfct_of(skb)))
		return 0;
	rec_begin(&after->hdr, REC_AFTER, j, NULL, now,
		  bpf_get_smp_processor_id());
	after->hdr.netns = netns;
	read_pkt(&after->pkt, skb, (void *)f->net);
	rec_send(after, sizeof(*after));
	return 0;
}

/* The same of packets that are numbers to the verifier, which looks at it but once. */
__verified_once_mem int frame_send_at(u64 now, u32 on, u32 n, struct journey *j,
				      u64 skb)
{
	struct frame *f = frame_at(n);

	if (f && j && has_rdonly_cast)
		send_frame(now, on, f, j, skb ? untrusted((void *)skb) : NULL);
	return 0;
}

static __noinline int frame_send_of(struct where *w, struct frame *f,
				    struct journey *j, struct sk_buff *skb)
{
	return send_frame(w->now, w->on, f, j, skb);
}

static __always_inline void frame_send(struct where *w, u32 n,
				       struct journey *j, struct sk_buff *skb)
{
	struct frame *f;

	if (has_rdonly_cast) {
		frame_send_at(w->now, w->on, n, j, number(skb));
		return;
	}
	f = frame_at(n);
	if (f)
		frame_send_of(w, f, j, skb);
}

/* Whether there is anything to tell of a frame since a queue refused its packet. */
static __always_inline bool frame_went_on(const struct frame *f)
{
	const u32 causes = ~(REC_F_NOTABLE | REC_F_REINJECTED);

	return f->nft || f->rec.runs || f->rec.nhits ||
	       f->rec.hdr.flags & causes;
}

/*
 * Ends a frame that does not have the CPU; skb, if not NULL, is still its packet, and j
 * its journey, if that is at hand.
 */
static __noinline int frame_end(struct where *w, u32 n, struct sk_buff *skb,
				struct journey *j)
{
	struct frame *f = frame_at(n);
	struct cpu *c;
	u64 key;

	if (!f || !f->sp || f->task == FRAME_NOBODYS)
		return 0;
	/* Another CPU may come to end it, too: the one where its packet turns up, or its stack's. */
	f->had_task = f->task;
	*(volatile u64 *)&f->task = FRAME_NOBODYS;
	if (f->rec.ntables && f->cpu != w->cpu) {
		c = bpf_map_lookup_elem(&cpus, &f->cpu);
		if (c && c->running == n)
			f->rec.hdr.flags |= REC_F_TORN;
	}
	/*
	 * Of a task that came here unseen nobody knows. But a packet may leave its hook, wait for
	 * an answer of ARP, and be let go by another CPU.
	 */
	if (nft_stats[0] && f->had_task && f->had_task == w->task &&
	    f->percpu != w->percpu)
		f->rec.hdr.flags |= REC_F_NFTMISSED;
	key = f->skb;
	if (!j || j->id != f->jid) {
		j = bpf_map_lookup_elem(&journeys, &key);
		skb = NULL; /* is another one */
	}
	if (j && j->id == f->jid) {
		j->frame = 0;
		if (!f->refused || frame_went_on(f))
			frame_send(w, n, j, skb);
	}
	if (f->had_task)
		__sync_fetch_and_add(&open_task_frames, -1);
	f->sp = 0;
	__sync_fetch_and_add(&open_frames, -1);
	return 0;
}

/* The innermost frame of a stack: a stack grows downwards. */
struct innermost {
	u64 task;
	u64 above;
	u64 sp;
	u32 first; /* of the frames to look through */
	u32 n;	   /* 1 + the frame; 0: none */
};

static long look_at_frame(u32 i, struct innermost *s)
{
	u32 n = s->first + i + 1;
	struct frame *f = frame_at(n);

	if (f && f->sp > s->above && f->task == s->task && f->sp < s->sp) {
		s->sp = f->sp;
		s->n = n;
	}
	return 0;
}

/* 1 + the innermost frame above some place in a task's stack, or in a CPU's softirqs'; 0: none. */
__verified_once u32 top_of(u64 task, u32 cpu, u64 above)
{
	struct innermost s = { .task = task, .above = above, .sp = ~0ULL };
	u32 *n;

	s.first = cpu * FRAMES;
	if (task) {
		/* A task may have come from another CPU. */
		if (!open_task_frames)
			return 0;
		n = bpf_map_lookup_elem(&task_frames, &task);
		if (!n)
			return 0;
		s.first = *n;
	}
	loop(FRAMES, FRAMES, look_at_frame, &s);
	return s.n;
}

/* The same of all of this stack. */
static __always_inline u32 frame_top(struct where *w)
{
	return top_of(w->task, w->cpu, 0);
}

/* Whether the call that sp names is made within one of a followed packet. */
static __always_inline bool within_frame(struct where *w, u64 sp)
{
	return w->c && open_frames &&
	       top_of(w->task, w->cpu, number((void *)sp));
}

/*
 * The task of frame n goes, or has come: what the CPU skips in between is of others, and
 * another CPU counts for itself. Calls of nf_tables' probe may be under way: of its copies
 * some may be skipped before, and the others behind.
 */
static __always_inline void frame_left(struct where *w, u32 n)
{
	struct frame *f = frame_at(n);

	if (!f || !nft_stats[0])
		return;
	/* It was the task's inner one that came here. */
	if (f->percpu != w->percpu)
		f->rec.hdr.flags |= REC_F_NFTMISSED;
	f->nft_missed |= nft_skipped(f->skipped, f->percpu);
}

static __always_inline void frame_came(struct where *w, struct frame *f)
{
	f->percpu = w->percpu;
	nft_count_skipped(f->skipped, w->percpu);
}

/* The innermost frame of this stack goes on. */
static __always_inline void frame_resume(struct where *w)
{
	u32 n = frame_top(w);

	if (n)
		frame_start(w, n);
}

/*
 * The packet of frame n appears. If the CPU was not its, but that of a call within its own, whose
 * end was not seen (the copy that TEE sent waits for an answer of ARP), then what was counted since is
 * of either.
 */
static __always_inline void frame_took(struct where *w, u32 n)
{
	struct frame *f, *inner;

	if (w->c->running == n || !w->c->running)
		return;
	f = frame_at(n);
	inner = frame_at(w->c->running);
	if (!f || !inner || inner->task != f->task || f->task != w->task ||
	    inner->sp >= f->sp || recseq_again(w->percpu) == inner->recseq)
		return;
	f->rec.hdr.flags |= REC_F_TORN;
	inner->rec.hdr.flags |= REC_F_TORN;
}

/*
 * A followed packet appears: the hook that it was in is over, and the one from within
 * which that was called goes on. skb, if not NULL, can be looked at. Returns the time.
 */
static __always_inline u64 hook_over(struct sk_buff *skb, struct journey *j,
				     enum on on)
{
	struct where w;
	u32 n = j->frame;

	if (!n || !where_am_i(&w, on))
		return bpf_ktime_get_ns();
	frame_took(&w, n);
	frame_stop(&w);
	frame_end(&w, n, skb, j);
	if (open_frames)
		frame_resume(&w);
	return w.now;
}

/* Frames of a stack whose calls are over when something happens at sp in it. */
struct pop {
	struct where *w;
	u64 sp;
	u32 first;
};

static long pop_one(u32 i, struct pop *p)
{
	u32 n = p->first + i + 1;
	struct frame *f = frame_at(n);

	if (f && f->sp && f->task == p->w->task && f->sp <= p->sp)
		frame_end(p->w, n, NULL, NULL);
	return 0;
}

static __always_inline void frames_pop(struct where *w, u64 sp)
{
	struct pop p = { .w = w, .sp = sp, .first = w->cpu * FRAMES };

	loop(FRAMES, FRAMES, pop_one, &p);
}

/*
 * A packet is about to enter a hook: the one that it was in is over, and whoever had the
 * CPU has it no more.
 */
static __always_inline void hook_next(struct where *w, struct sk_buff *skb,
				      struct journey *j)
{
	u32 n = j ? j->frame : 0;

	if (n)
		frame_took(w, n);
	frame_stop(w);
	if (n)
		frame_end(w, n, skb, j);
}

struct find_tables {
	struct frame *f;
	u64 head, node;
	u32 pf, hook;
	u32 on;
};

static long find_table(u32 i, struct find_tables *t)
{
	struct xt_table_head h;
	struct frame *f = t->f;
	struct frame_table *ft;
	struct hook_table *ht;
	struct xt_tab *tab;
	u64 node = t->node;
	u64 n;

	if (node == t->head ||
	    bpf_probe_read_kernel(&h, sizeof(h), (void *)node))
		return 1;
	t->node = h.next;
	if (!(h.valid_hooks & (1 << (t->hook & 7))))
		return 0;
	n = f->rec.ntables;
	if (n >= MAX_TABLES)
		return 1;
	f->rec.ntables = n + 1;
	ft = &f->tables[n];
	ht = &f->rec.tables[n];
	ft->table = node;
	ft->number = 0;
	ft->blocks = 0;
	ht->private = h.private;
	ht->gen = 0;
	bpf_probe_read_kernel(ht->name, sizeof(ht->name),
			      (void *)(node + xt.name));
	tab = bpf_map_lookup_elem(&xt_tables, &h.private);
	if (!tab) {
		tab = tab_make(h.private, t->pf, t->on);
		f->fresh = 1;
		/*
		 * Another CPU may have replaced and freed it since its address was read.
		 * Nothing is known of it then, for the next table there is another one. One
		 * that is still in use now will be forgotten when it is freed.
		 */
		if (table_private(node) != h.private) {
			bpf_map_delete_elem(&xt_tables, &h.private);
			f->rec.hdr.flags |= REC_F_REPLACED;
			f->kept = 0;
			return 0;
		}
	}
	if (!tab || f->blocks + tab->blocks > snap_blocks) {
		f->rec.hdr.flags |= REC_F_NOTABLE;
		f->kept = 0;
		return 0;
	}
	if (tab->blocks > 1 || f->slots >> (tab->slot % KEPT) & 1)
		f->kept = 0;
	f->slots |= 1ULL << (tab->slot % KEPT);
	ft->slot = tab->slot;
	ht->gen = tab->gen;
	ft->snap = f->blocks;
	f->blocks += tab->blocks;
	ft->number = tab->number;
	ft->blocks = tab->blocks;
	ft->at = nr_cpus > 1 ? tab->base[0] : tab->entries;
	return 0;
}

/*
 * The tables of a hook as they were found there last, per CPU: tasks have one half of them
 * and softirqs the other, so that nobody uses one while it is being made.
 */
struct plan {
	u64 net;
	u64 frees; /* xt_frees before they were looked for */
	u64 head;  /* the namespace's list of tables: new ones come first */
	u64 newest;
	u32 pf, hook;
	u32 blocks;
	u32 ntables;
	u32 kept;
	u32 pad;
	struct frame_table tables[MAX_TABLES];
	struct hook_table rec[MAX_TABLES];
};

#define PLANS 64

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2 * PLANS);
	__type(key, u32);
	__type(value, struct plan);
} plans SEC(".maps");

/* Hooks of one namespace never share a place. */
static __always_inline struct plan *plan_of(struct where *w, struct frame *f)
{
	/* The multiplier of Knuth's 64-bit generator (MMIX). */
	u32 key = f->net * 6364136223846793005ULL >> 58,
	    at = f->rec.place.hook << 1;

	/* Tasks that preempt each other would share a half. */
	if (w->task && hook_copies > 1 && !has_preempt_disable)
		return NULL;
	/* The hooks of IPv4 and IPv6 are 0 to 4, those of ARP 0 to 2. */
	if (f->rec.place.pf == NFPROTO_ARP)
		at += 10;
	key ^= at | (f->rec.place.pf == NFPROTO_IPV6);
	key = key % PLANS + (w->task ? PLANS : 0);
	return bpf_map_lookup_elem(&plans, &key);
}

/* Whether a table was replaced or came since. The branch is the caller's, once for all. */
static __always_inline u64 plan_changed(struct plan *p, const bool cast)
{
	u64 diff = read_word(p->head, cast) ^ p->newest;

#pragma unroll
	for (int i = 0; i < MAX_TABLES; i++) {
		if (i >= p->ntables)
			break;
		diff |= read_word(p->tables[i].table +
					  offsetof(struct xt_table_head,
						   private),
				  cast) ^
			p->rec[i].private;
	}
	return diff;
}

/* Most hooks have no more tables. */
#define USUAL_TABLES 3

/* Gives a frame the tables of its hook, if no table was replaced or came since. */
static __noinline bool plan_use(struct where *w, struct frame *f)
{
	struct plan *p = plan_of(w, f);
	u64 diff;

	if (!p || p->net != f->net || p->hook != f->rec.place.hook ||
	    p->pf != f->rec.place.pf || p->frees != f->frees)
		return false;
	diff = has_rdonly_cast ? plan_changed(p, true) : plan_changed(p, false);
	if (diff)
		return false;
	f->blocks = p->blocks;
	f->kept = p->kept;
	f->rec.ntables = p->ntables;
	if (p->ntables <= USUAL_TABLES) {
		__builtin_memcpy(f->tables, p->tables,
				 USUAL_TABLES * sizeof(f->tables[0]));
		__builtin_memcpy(f->rec.tables, p->rec,
				 USUAL_TABLES * sizeof(p->rec[0]));
	} else {
		__builtin_memcpy(f->tables, p->tables, sizeof(f->tables));
		__builtin_memcpy(f->rec.tables, p->rec, sizeof(p->rec));
	}
	return true;
}

static __noinline int plan_make(struct where *w, struct frame *f, u64 head,
				u64 newest)
{
	struct plan *p = plan_of(w, f);

	/* A namespace that goes frees its tables; if it has none, nobody tells. */
	if (!p || !f->rec.ntables || f->rec.hdr.flags & REC_F_NOTABLE)
		return 0;
	p->net = f->net;
	p->frees = f->frees;
	p->head = head;
	p->newest = newest;
	p->pf = f->rec.place.pf;
	p->hook = f->rec.place.hook;
	p->blocks = f->blocks;
	p->kept = f->kept;
	p->ntables = f->rec.ntables;
	__builtin_memcpy(p->tables, f->tables, sizeof(f->tables));
	__builtin_memcpy(p->rec, f->rec.tables, sizeof(p->rec));
	return 0;
}

/* net/netfilter/x_tables.c: the tables of a namespace that a hook runs through. */
static __apart int find_tables(struct where *w, struct frame *f,
			       struct net *net)
{
	u32 pf = f->rec.place.pf;
	struct find_tables t = {
		.f = f, .pf = pf, .hook = f->rec.place.hook, .on = w->on
	};
	u64 newest;

	if (!xt.on ||
	    (pf != NFPROTO_IPV4 && pf != NFPROTO_IPV6 && pf != NFPROTO_ARP))
		return 0;
	if (plan_use(w, f))
		return 0;
	t.head = xt_tables_of(net, xt.pernet_id, pf);
	if (!t.head)
		return 0;
	newest = read_u64(t.head);
	if (!newest)
		return 0;
	t.node = newest;
	loop(2 * MAX_TABLES, 2 * MAX_TABLES, find_table, &t);
	plan_make(w, f, t.head, newest);
	return 0;
}

struct find_free {
	u32 cpu;
	u32 next;
	u32 n; /* 1 + the frame; 0: none */
};

static long find_free(u32 i, struct find_free *s)
{
	u32 n = s->cpu * FRAMES + (s->next + i) % FRAMES + 1;
	struct frame *f = frame_at(n);

	if (!f || f->sp)
		return 0;
	s->n = n;
	return 1;
}

/* Frame n is open, and has the CPU. */
static __always_inline void frame_counted(struct where *w, struct frame *f,
					  u32 n, struct journey *j)
{
	__sync_fetch_and_add(&open_frames, 1);
	if (f->task)
		__sync_fetch_and_add(&open_task_frames, 1);
	j->frame = n;
	frame_start(w, n);
}

/*
 * A followed packet enters a hook. sp names the call; with_tables is whether xtables' tables
 * may be there.
 */
static __always_inline void
frame_open(struct where *w, u64 sp, struct sk_buff *skb,
	   struct nf_hook_state *state, u8 hook, struct journey *j,
	   const struct decision *d, const bool with_tables)
{
	struct net *net = get(state, net);
	struct find_free s = {};
	struct frame *f;
	u64 task;

	if (open_frames)
		frames_pop(w, sp);
	s.cpu = w->cpu;
	s.next = w->c->next++;
	/* The first one mostly is. */
	if (!find_free(0, &s))
		loop(FRAMES, FRAMES, find_free, &s);
	f = frame_at(s.n);
	if (!f) {
		count_loss(LOSS_FRAMES);
		j->seq++; /* a hole in the path */
		return;
	}
	/* Nobody's, but taken, until it is whole: a softirq may come and look for frames. */
	*(volatile u64 *)&f->task = FRAME_NOBODYS;
	*(volatile u64 *)&f->sp = sp;
	f->skb = (u64)skb;
	f->jid = j->id;
	f->net = (u64)net;
	f->frees = xt_frees;
	f->cpu = w->cpu;
	f->copied = 0;
	f->split = 0;
	f->morphed = 0;
	f->refused = 0;
	f->blocks = 0;
	f->fresh = 0;
	f->kept = !w->task;
	f->slots = 0;
	f->first = d->first;
	f->rec.hdr.flags = d->flags;
	f->rec.hdr.netns = get(net, ns.inum);
	f->rec.entry_ts = w->now;
	f->rec.ntables = 0;
	f->rec.nhits = 0;
	f->rec.runs = 0;
	read_place(&f->rec.place, skb, state);
	f->rec.place.hook = hook;
	if (with_tables)
		find_tables(w, f, net);
	if (f->first || f->rec.ntables || nft_on ||
	    (ebt_on && f->rec.place.pf == NFPROTO_BRIDGE))
		read_pkt(&f->rec.before, skb, net);
	f->nft = 0;
	f->nft_changed = 0;
	if (bpf_core_field_exists(net->nft.gencursor))
		f->nft_cursor = get(net, nft.gencursor);
	f->nft_base = 0;
	f->nft_basechain = 0;
	f->flowtable = 0;
	f->nft_missed = 0;
	frame_came(w, f);

	task = w->task;
	*(volatile u64 *)&f->task = task;
	if (task) {
		u32 pool = w->cpu * FRAMES, *had;

		had = bpf_map_lookup_elem(&task_frames, &task);
		if (!had || *had != pool)
			bpf_map_update_elem(&task_frames, &task, &pool,
					    BPF_ANY);
	}
	frame_counted(w, f, s.n, j);
}

/* What a frame says from here on is a part of its own. */
static __always_inline void frame_new_part(struct frame *f)
{
	f->first = 0;
	f->rec.hdr.flags &= REC_F_NOTABLE | REC_F_REINJECTED;
	f->rec.nhits = 0;
	f->rec.runs = 0;
}

/*
 * nf_nat_manip_pkt is called within a hook: a part of the call ends here, as far as
 * records go. Returns whether the packet is known to be in a hook.
 */
static __always_inline bool frame_split(struct where *w, struct sk_buff *skb,
					struct journey *j, enum on on)
{
	u32 n = j->frame;
	struct frame *f = frame_of(j);

	if (!f || !where_am_i(w, on))
		return false;
	frame_stop(w);
	/* What nf_tables marks behind it had another mark: the one at the call. No branch to follow. */
	f->first |= nft_on;
	frame_send(w, n, j, skb);
	f->split++;
	frame_new_part(f);
	frame_start(w, n);
	return true;
}

/*
 * The packet is about to be put into a queue. Its frame ends here, and not where the packet
 * appears again: who reads the queue may have sent it on, on another CPU, before the hook has
 * returned on this one.
 */
static __always_inline void frame_queue(struct sk_buff *skb, struct journey *j,
					enum on on)
{
	struct frame *f = frame_of(j);

	j->queued = f ? j->frame : 0;
	if (!f)
		return;
	f->had_sp = f->sp;
	hook_over(skb, j, on);
}

/*
 * It is somewhere else. If nobody has told that it left the queue it was put into, the kernel
 * skipped the probe that would have, and what was left of the hook.
 */
static __always_inline void left_queue(struct journey *j)
{
	/* A hole in the path. No branch, whose ways the verifier would follow. */
	j->seq += nonzero(j->queued);
	j->queued = 0;
}

/* It was not put there, and may go on: so does its frame, if no other has taken its place. */
static __always_inline void frame_refused(struct sk_buff *skb,
					  struct journey *j, enum on on)
{
	u32 n = j->queued;
	struct frame *f = frame_at(n);
	struct where w;

	if (!f || !where_am_i(&w, on))
		return;
	j->queued = 0;
	frame_stop(&w);
	if (f->sp || f->jid != j->id) {
		count_loss(LOSS_FRAMES);
		j->seq++; /* a hole in the path */
		return;
	}
	*(volatile u64 *)&f->sp = f->had_sp; /* nobody's still */
	f->refused = 1;
	f->split = 0;
	f->morphed = 0;
	f->nft = 0;
	f->nft_changed = 0;
	frame_new_part(f);
	read_pkt(&f->rec.before, skb, (void *)f->net);
	*(volatile u64 *)&f->task = f->had_task;
	frame_counted(&w, f, n, j);
}

/* How many tables a frame that has the CPU has run through, in its newest part. */
static __always_inline u32 frame_runs(const struct frame *f)
{
	return f->rec.runs + (recseq_again(this_cpu()) + 1) / 2 -
	       (f->recseq + 1) / 2;
}

/* Whether a table of the frame's hook was run through, or may have been. */
static __always_inline bool frame_evaluated(struct frame *f)
{
	return f->rec.nhits || f->rec.runs ||
	       recseq_again(this_cpu()) != f->recseq;
}

/* The packet has become another one before any table saw it. */
static __always_inline void frame_again(struct sk_buff *skb, struct journey *j)
{
	struct frame *f = frame_of(j);

	if (f && !f->split && !f->nft &&
	    (f->rec.ntables ? !frame_evaluated(f) : nft_on))
		read_pkt(&f->rec.before, skb, (void *)f->net);
}

/*
 * Whether another copy of the probe was here for this call, and nothing was
 * evaluated since. Else it is a call before it, of a packet whose end was not seen.
 */
static __always_inline bool same_call(u64 sp, struct nf_hook_state *state,
				      struct journey *j)
{
	struct frame *f = frame_of(j);

	return f && f->sp == sp && f->rec.place.hook == get(state, hook) &&
	       f->rec.place.pf == get(state, pf) && !f->split && !f->rec.runs &&
	       !f->nft && f->recseq == recseq_again(this_cpu());
}

#endif
