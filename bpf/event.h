/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The records that cross from the kernel to Go. bpf2go makes the Go types from
 * these structs; nothing is written twice. All records begin with rec_hdr.
 */
#ifndef NFTRACE_EVENT_H
#define NFTRACE_EVENT_H

enum rec_type {
	REC_START = 1,	 /* rec_hook: a journey begins, before the hook */
	REC_HOOK = 2,	 /* rec_hook: nf_hook_slow returned */
	REC_TABLE = 3,	 /* rec_table: a table's run ended */
	REC_NAT = 4,	 /* rec_nat: before and after nf_nat_manip_pkt */
	REC_BRIDGE = 5,	 /* rec_dev: br_forward chose a port */
	REC_XMIT = 6,	 /* rec_dev: __dev_queue_xmit */
	REC_DELIVER = 7, /* rec_dev: handed to the local protocol */
	REC_END = 8,	 /* rec_hdr: the skb's life ended */
	REC_AFTER = 10,	 /* rec_pkt: the packet as the table left it, where the
			  * table changed it; follows its REC_TABLE */
	REC_FOREIGN = 9, /* rec_table: a run of an untraced packet that
			  * overlapped with a traced one on the same CPU */
};

struct rec_hdr {
	__u64 ts;  /* CLOCK_MONOTONIC, ns */
	__u64 jid; /* the journey; 0 in REC_FOREIGN */
	__u32 seq; /* number of this record within the journey, from 0 */
	__u32 netns;
	__u16 type; /* enum rec_type */
	__u16 cpu;
	__u32 flags; /* enum rec_flag */
};

enum rec_flag {
	/* Of rec_table. */
	REC_F_ALIVE = 0x0001,	     /* the packet left the table alive */
	REC_F_TORN = 0x0002,	     /* a run on this CPU fell into a copy */
	REC_F_MIGRATED = 0x0004,     /* entry and exit on different CPUs */
	REC_F_REPLACED = 0x0008,     /* the table was replaced meanwhile */
	REC_F_NOTABLE = 0x0010,	     /* more entries than there is room for */
	REC_F_TOOMANY = 0x0040,	     /* more rules matched than MAX_HITS */
	REC_F_MISSED_ENTRY = 0x0080, /* the entry probe was skipped */
	REC_F_ATOMIC = 0x0200,	     /* bottom halves were off throughout */
	REC_F_SHARED = 0x0400,	     /* others ran between entry and exit */
	REC_F_FAULT = 0x0800,	     /* counters could not be read */
	/* Of rec_nat. */
	REC_F_NAT_AFTER = 0x1000, /* the packet after the rewrite */
	/* Of every record of a journey. */
	REC_F_HOLE = 0x8000,	  /* a table's run before it was not recorded */
	REC_F_TENTATIVE = 0x4000, /* the filter has not matched yet */
	/* Of REC_START. */
	REC_F_LATE =
		0x2000, /* it passed hooks before at which it did not match */
};

struct dev {
	__u32 ifindex; /* 0: none */
	char name[16];
};

#define PKT_DATA 160
#define PKT_MAC	 32

enum pkt_flag {
	PKT_F_OWNER = 0x1, /* uid and gid hold */
	PKT_F_CT = 0x2,	   /* skb->_nfct is set */
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
	__u8 mac[PKT_MAC];
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

struct rec_hook {
	struct rec_hdr hdr;
	struct place place;
	__s32 ret; /* nf_hook_slow: 1 accept, <0 errno, 0 stolen or queued */
	__u32 pad;
	struct pkt pkt; /* REC_START only */
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
	struct pkt pkt;
};

struct hit {
	__u32 index;   /* of the entry in the table, from 0 */
	__u32 packets; /* by how much the counters grew */
	__u64 bytes;
};

struct rec_pkt {
	struct rec_hdr hdr;
	struct pkt pkt;
};

#define MAX_HITS 1024

struct rec_table {
	struct rec_hdr hdr;
	struct place place;
	__u64 private; /* struct xt_table_info * */
	__u64 gen;     /* tells tables at one address apart */
	__u64 entry_ts;
	__u32 verdict;
	__u32 nhits;
	char table[32];
	struct pkt before;
	struct hit hits[MAX_HITS]; /* nhits of them are sent */
};

/* Per-CPU counts of everything that was not recorded, by cause. */
enum loss {
	LOSS_RINGBUF,	  /* the ring buffer was full: a record is lost */
	LOSS_JOURNEYS,	  /* too many packets under way: one was not followed */
	LOSS_SLOTS,	  /* too many table runs open on a CPU */
	LOSS_EXIT_MISSED, /* a table's run without its exit */
	LOSS_MAX,
};

/* What user space asks of the table that it reads (xt_find_table_lock). */
struct lookup {
	__u64 private; /* struct xt_table_info *, 0: no such table */
	__u64 gen;
};

#endif
