/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The records that cross from the kernel to Go. bpf2go makes the Go types from
 * these structs; nothing is written twice. All records begin with rec_hdr.
 */
#ifndef NFTRACE_EVENT_H
#define NFTRACE_EVENT_H

enum rec_type {
	REC_HOOK = 1,	/* rec_hook: a call of nf_hook_slow, or a part of it */
	REC_AFTER = 2,	/* rec_pkt: the packet behind the hook, where it changed
			  * there; follows its REC_HOOK */
	REC_NAT = 3,	/* rec_nat: nf_nat_manip_pkt was called within the hook
			  * whose part came before; another part follows */
	REC_BRIDGE = 4, /* rec_dev: br_forward chose a port */
	REC_XMIT = 5,	/* rec_dev: __dev_queue_xmit */
	REC_DELIVER = 6, /* rec_dev: handed to the local protocol */
	REC_DROP = 7,	 /* rec_hdr: nf_hook_slow dropped it, or, where it is
			  * REC_F_REINJECTED, who reads its queue */
	REC_END = 8,	 /* rec_hdr: the skb's life ended */
	REC_NFT = 9, /* rec_nft: what nf_tables did; the REC_HOOK of the call
			  * (or its part) that it was within follows */
	REC_SEEN =
		10, /* rec_pkt: the packet behind the rule of the next REC_NFT, or the
			* table of the next REC_EBT, where it changed since the call or
			* the last of these */
	REC_FLOW =
		11, /* rec_flow: a flowtable sent it on, out of the hook whose REC_HOOK
			* follows */
	REC_EBT = 12, /* rec_ebt: a run of a table of ebtables, as REC_NFT */
};

struct rec_hdr {
	__u64 ts;  /* CLOCK_MONOTONIC, ns */
	__u64 jid; /* the journey */
	__u32 seq; /* number of this record within the journey, from 0 */
	__u32 netns;
	__u16 type; /* enum rec_type */
	__u16 cpu;
	__u32 flags; /* enum rec_flag */
};

enum rec_flag {
	/* Of REC_HOOK and REC_EBT: why tables cannot be told. */
	REC_F_TORN = 0x0001,	 /* others ran through the tables unseen */
	REC_F_REPLACED = 0x0002, /* a table was replaced meanwhile */
	REC_F_NOTABLE = 0x0004,	 /* more entries than there is room for */
	REC_F_TOOMANY = 0x0008,	 /* more rules matched than MAX_HITS */
	REC_F_FAULT = 0x0010,	 /* counters could not be read */
	/* Of REC_HOOK. */
	REC_F_UNCOUNTED = 0x0020, /* within another's run: runs says nothing */
	REC_F_UNSEEN = 0x0040, /* what became of the packet there was not seen:
				* without REC_AFTER it may have changed, too */
	REC_F_NFTMISSED =
		0x0080, /* something that nf_tables did may be missing */
	REC_F_TRACKED = 0x0400, /* the packet had a conntrack entry behind it */
	REC_F_SPLIT = 0x1000,	/* a part of a call behind REC_NAT */
	REC_F_REINJECTED =
		0x0800, /* what was left of the hook behind NFQUEUE; REC_DROP's, too */
	/* Of REC_EBT. */
	REC_F_NOENTRY = 0x0200, /* another call came in between, or the
				 * beginning of this one was not seen */
	/* Of REC_SEEN. */
	REC_F_BETWEEN = 0x0100, /* it is so before the next rule, too */
	/* Of the REC_HOOK that is the first record of its journey. */
	REC_F_LATE =
		0x2000, /* it passed hooks before at which it did not match */
	/* Of every record of a journey. */
	REC_F_TENTATIVE = 0x4000, /* the filter has not matched yet */
};

struct dev {
	__u32 ifindex; /* 0: none */
	char name[16];
};

#define PKT_DATA 160
#define PKT_MAC	 32

enum pkt_flag {
	PKT_F_OWNER = 0x1,  /* uid and gid hold */
	PKT_F_CT = 0x2,	    /* skb->_nfct is set */
	PKT_F_CTMARK = 0x4, /* there is a conntrack entry, and ct_mark holds */
	PKT_F_CONFIRMED =
		0x8, /* which is not that of its first packet (IPS_CONFIRMED) */
};

/* The head of a packet: what TRACE prints of it. */
struct pkt {
	__u32 len;	 /* skb->len */
	__u32 mark;	 /* skb->mark */
	__u32 uid, gid;	 /* of the owning socket's file (PKT_F_OWNER) */
	__u16 ethertype; /* skb->protocol, host byte order */
	__u16 dev_type;	 /* ARPHRD_* of skb->dev */
	__u16 vlan;	 /* 1 + VLAN id; 0: untagged */
	__u16 cap;	 /* bytes of data that hold */
	__u8 mac_len;	 /* bytes of mac that hold */
	__u8 ctinfo;	 /* enum ip_conntrack_info */
	__u8 flags;	 /* enum pkt_flag */
	__u8 pad;
	__u32 ct_mark; /* nf_conn.mark (PKT_F_CTMARK), else 0 */
	/* Copied and compared by words. */
	__u8 mac[PKT_MAC] __attribute__((aligned(8)));
	__u8 data[PKT_DATA]; /* from the network header on */
};

/* Where netfilter runs: struct nf_hook_state and nf_bridge_info. */
struct place {
	struct dev in, out;
	struct dev physout;
	__u32 physin; /* ifindex */
	__u8 hook;
	__u8 pf;
	__u16 pad;
};

struct rec_dev {
	struct rec_hdr hdr;
	struct dev dev;
	__u32 pad;
};

struct rec_nat {
	struct rec_hdr hdr;
	__u8 manip; /* enum nf_nat_manip_type: 0 source, 1 destination */
	__u8 dir;   /* enum ip_conntrack_dir */
	__u16 pad[3];
};

struct rec_pkt {
	struct rec_hdr hdr;
	struct pkt pkt;
};

enum nft_what {
	NFT_DID_RULE = 1, /* a rule ran to its end */
	NFT_DID_END = 2,  /* the end of a chain was reached */
	NFT_DID_POLICY = 3,
};

/*
 * One call of __nft_trace_packet, net/netfilter/nf_tables_core.c. Handles are nf_tables'
 * own: a table's is unique in its namespace, those of its chains and rules within it, and none is
 * used twice.
 */
struct rec_nft {
	struct rec_hdr hdr;
	__u64 table; /* handle */
	__u64 base;  /* of the base chain */
	__u64 rule;  /* of NFT_DID_RULE */
	__u64 chain; /* where NFT_JUMP and NFT_GOTO lead; whose end it is */
	__u32 gen;   /* of the namespace's rulesets (NFTA_GEN_ID) */
	__s32 code;  /* verdict: NF_*, or negative: NFT_* */
	__u8 what;   /* enum nft_what */
	__u8 family; /* of the table (NFPROTO_*) */
	__u8 ctinfo; /* as in struct pkt */
	__u8 flags;  /* enum pkt_flag */
	/* A commit put gen in force since the hook was entered, or since the record before. */
	__u8 flipped;
	__u8 runs; /* tables of xtables that were run through before it (xt_recseq) */
	__u8 pad[2];
	/* Of the first one of a run of a base chain only. */
	char name[32];	     /* of the table, cut */
	char chain_name[32]; /* of the base chain, cut */
};

/* What flowtable it was. Names are cut. */
struct rec_flow {
	struct rec_hdr hdr;
	__u8 family; /* of its table (NFPROTO_*) */
	__u8 pad[7];
	char table[32];
	char name[32];
};

/* A legacy table that a hook can run through. */
struct hook_table {
	__u64 private; /* struct xt_table_info * */
	__u64 gen;     /* tells tables at one address apart */
	char name[8];  /* "filter"; all that there are have at most 8 letters */
};

#define MAX_TABLES 6

/* A rule's counters grew. */
struct hit {
	__u32 index; /* of the entry in the table, from 0 */
	__u16 table; /* index into rec_hook.tables */
	__u16 packets;
	__u64 bytes;
};

#define MAX_HITS 512

/*
 * What happened to a packet in a call of nf_hook_slow. It is sent when the packet
 * appears elsewhere, or is known to be gone; what comes next in the journey tells the
 * hook's verdict. nf_nat_manip_pkt, which changes the packet in the midst of
 * the call, divides it in parts.
 */
struct rec_hook {
	struct rec_hdr hdr;
	__u64 entry_ts;
	struct place place;
	__u32 ntables; /* in tables; 0: the record ends before nhits */
	/* At the call; behind REC_NAT, where the part ended. Without tables only the
	 * first record of a journey has it, those behind REC_NAT, those in which
	 * nf_tables or ebtables told of a rule, and, where nf_tables has rules, those
	 * before REC_NAT. */
	struct pkt before;
	__u32 nhits;
	__u32 runs; /* tables that were run through (xt_recseq) */
	struct hook_table tables[MAX_TABLES];
	struct hit hits[MAX_HITS]; /* nhits of them are sent, in no order */
};

/* A call of net/bridge/netfilter/ebtables.c:ebt_do_table. */
struct rec_ebt {
	struct rec_hdr hdr;
	__u64 private; /* struct ebt_table_info * */
	__u64 gen;     /* tells tables at one address apart */
	char name[8];  /* "broute", "nat", "filter" */
	__u32 nhits;
	__u8 hook;    /* NF_BR_* */
	__u8 verdict; /* what it returned: NF_ACCEPT or NF_DROP */
	__u16 pad;
	struct hit hits[MAX_HITS]; /* nhits of them are sent, in order */
};

/* Per-CPU counts of everything that was not recorded, by cause. */
enum loss {
	LOSS_RINGBUF,  /* the ring buffer was full: a record is lost */
	LOSS_JOURNEYS, /* too many packets under way: one was not followed */
	LOSS_FRAMES,   /* too many calls of hooks open on a CPU */
	LOSS_SKIPPED, /* the kernel skipped kprobes: what they would have told of */
	LOSS_MAX,
};

/* A table was replaced: this is the new one. */
struct new_table {
	__u64 private; /* struct xt_table_info *; 0: nf_tables', all of a namespace */
	__u64 gen;
	__u32 netns; /* of the task that replaced it */
	__u32 pf;    /* of xtables and ebtables */
	char name[32];
};

/* Which table user space reads (xt_find_table_lock, copy_everything_to_user). */
struct lookup {
	__u64 private; /* struct xt_table_info *, 0: no such table */
	__u64 gen;
};

#endif
