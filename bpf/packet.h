/* SPDX-License-Identifier: GPL-2.0 */
/* The head of a packet and the place where it is, as records hold them. */
#ifndef NFTRACE_PACKET_H
#define NFTRACE_PACKET_H

#include "maps.h"
#include "compat.h"

static __always_inline void read_dev(struct dev *d, struct net_device *dev)
{
	if (!dev) {
		d->ifindex = 0;
		return;
	}
	d->ifindex = get(dev, ifindex);
#ifndef NFTRACE_KPROBE
	/* 16 bytes; d->name is aligned to 4 only */
	u64 name = *(u64 *)&dev->name[0];
	__builtin_memcpy(&d->name[0], &name, 8);
	name = *(u64 *)&dev->name[8];
	__builtin_memcpy(&d->name[8], &name, 8);
#else
	bpf_probe_read_kernel(d->name, sizeof(d->name), &dev->name);
#endif
}

/* net/netfilter/nf_log_syslog.c:nf_log_dump_packet_common */
static __always_inline void read_place(struct place *p, struct sk_buff *skb,
				       struct nf_hook_state *state)
{
	u64 nb = bridge_info(skb);

	p->hook = get(state, hook);
	p->pf = get(state, pf);
	read_dev(&p->in, get(state, in));
	read_dev(&p->out, get(state, out));
	p->physin = 0;
	p->physout.ifindex = 0;
	if (nb) {
		struct net_device *dev;

		p->physin = physin_of(nb);
		dev = (void *)read_u64(
			nb + bpf_core_field_offset(struct nf_bridge_info,
						   physoutdev));
		if (dev) {
			p->physout.ifindex = BPF_CORE_READ(dev, ifindex);
			bpf_probe_read_kernel(p->physout.name,
					      sizeof(p->physout.name),
					      &dev->name);
		}
	}
}

/* net/netfilter/nf_log_syslog.c:nf_log_dump_sk_uid_gid */
static __always_inline void read_owner(struct pkt *p, struct sk_buff *skb,
				       struct net *net)
{
	struct sock *sk = get(skb, sk);
	struct socket *sock;
	struct file *file;
	const struct cred *cred;
	u8 state;

	if (!sk)
		return;
	state = get(sk, __sk_common.skc_state);
	if (state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV)
		return;
	if (get(sk, __sk_common.skc_net.net) != net)
		return;
	sock = get(sk, sk_socket);
	if (!sock)
		return;
	file = get(sock, file);
	if (!file)
		return;
	cred = get(file, f_cred);
	if (!cred)
		return;
	p->uid = get(cred, fsuid.val);
	p->gid = get(cred, fsgid.val);
	p->flags |= PKT_F_OWNER;
}

/* Words of pkt.data; those behind are not there where cap is no more than they hold. */
#define SHORT_WORDS 12

/* pkt.data by words; volatile, or clang would load many of them first, onto the stack. */
static __always_inline volatile u64 *data_words(const struct pkt *p)
{
	return (void *)p->data;
}

/*
 * Copies p->cap bytes from the network header on. What is behind the linear part
 * (skb_shared_info is, and longer than this) is read with it and not used: so same_data
 * need not care.
 */
__verified_once_mem int copy_data(struct pkt *p, u64 at)
{
	if (!p)
		return 0;
	if (has_rdonly_cast) {
		const struct many_words *from = words_at((void *)at);
		volatile u64 *to = data_words(p);

#pragma unroll
		for (int i = 0; i < PKT_DATA / 8; i++) {
			if (i == SHORT_WORDS && p->cap <= i * 8)
				break;
			to[i] = from->w[i];
		}
	} else if (bpf_probe_read_kernel(p->data, sizeof(p->data),
					 (void *)at)) {
		p->cap = 0;
	}
	return 0;
}

/* Copies p->mac_len bytes of the header of the link layer, and what is behind. */
__verified_once_mem int copy_mac(struct pkt *p, u64 at)
{
	if (!p)
		return 0;
	if (has_rdonly_cast) {
		const struct many_words *from = words_at((void *)at);
		u64 *to = (void *)p->mac;

		to[0] = from->w[0];
		to[1] = from->w[1];
		if (p->mac_len <= 16)
			return 0;
		to[2] = from->w[2];
		to[3] = from->w[3];
	} else if (bpf_probe_read_kernel(p->mac, sizeof(p->mac), (void *)at)) {
		p->mac_len = 0;
	}
	return 0;
}

/* Kernels without CONFIG_NF_CONNTRACK_MARK have no marks of connections. */
#define has_ct_mark bpf_core_field_exists(struct nf_conn, mark)

/* What is read of no entry is 0. */
static __always_inline u32 read_ct_mark(u64 nfct)
{
	return read_u32((nfct & ~7ULL) +
			bpf_core_field_offset(struct nf_conn, mark));
}

/* Whether the packet has a conntrack entry, and its mark. */
static __always_inline void read_ct(struct pkt *p, u64 nfct)
{
	u64 ct = nfct & ~7ULL;

	p->flags = nfct ? PKT_F_CT : 0;
	p->ct_mark = 0;
	if (!ct || !has_ct_mark)
		return;
	p->flags |= PKT_F_CTMARK;
	if (read_u64(ct + bpf_core_field_offset(struct nf_conn, status)) &
	    IPS_CONFIRMED)
		p->flags |= PKT_F_CONFIRMED;
	p->ct_mark = read_ct_mark(nfct);
}

/* What targets may change of a packet. */
static __always_inline void read_data(struct pkt *p, struct sk_buff *skb,
				      u64 head, u32 nh)
{
	u32 off = number(get(skb, data)) - head;
	u32 lin = get(skb, len) - get(skb, data_len) + off;

	/* From the network header on, wherever skb->data is. */
	p->len = get(skb, len) + off - nh;
	p->mark = get(skb, mark);
	p->ctinfo = nfct_of(skb) & 7;
	/* The linear part, from the network header on. */
	lin = lin > nh ? lin - nh : 0;
	if (lin > PKT_DATA)
		lin = PKT_DATA;
	p->cap = lin;
	copy_data(p, head + nh);
}

static __always_inline void read_all(struct pkt *p, struct sk_buff *skb,
				     struct net *net)
{
	u32 nh = get(skb, network_header), mh = get(skb, mac_header), mac_len;
	struct net_device *dev = get(skb, dev);
	u64 head = number(get(skb, head));

	read_data(p, skb, head, nh);
	read_ct(p, nfct_of(skb));
	p->ethertype = protocol_of(skb);
	p->vlan = vlan_of(skb);
	read_owner(p, skb, net);
	p->mac_len = 0;
	p->dev_type = 0;
	if (dev) {
		p->dev_type = get(dev, type);
		mac_len = get(dev, hard_header_len);
		/* dump_mac_header prints hard_header_len bytes */
		if (mh != 0xffff && mh != nh && mac_len && mac_len <= PKT_MAC) {
			p->mac_len = mac_len;
			copy_mac(p, head + mh);
		}
	}
}

/* The same of packets that are numbers to the verifier, which looks at it but once. */
__verified_once_mem int read_pkt_at(struct pkt *p, u64 skb, u64 net)
{
	if (p && has_rdonly_cast)
		read_all(p, untrusted((void *)skb),
			 bpf_rdonly_cast((void *)net,
					 bpf_core_type_id_kernel(struct net)));
	return 0;
}

static __noinline int read_pkt_of(struct pkt *p, struct sk_buff *skb,
				  struct net *net)
{
	read_all(p, skb, net);
	return 0;
}

static __always_inline void read_pkt(struct pkt *p, struct sk_buff *skb,
				     struct net *net)
{
	if (has_rdonly_cast)
		read_pkt_at(p, number(skb), number(net));
	else
		read_pkt_of(p, skb, net);
}

#define NO_NFCT 1

/*
 * Whether two states of a packet differ in nothing that a target may have changed. Time to
 * live and checksum are left out: routing changes them, too. nfct, if not NO_NFCT, is the packet's
 * skb->_nfct now, whose mark is to be b's.
 */
__verified_once_mem int same_data(const struct pkt *a, const struct pkt *b,
				  u64 nfct)
{
	volatile const u64 *x, *y;
	u64 diff, first, second;

	if (!a || !b)
		return false;
	x = data_words(a);
	y = data_words(b);
	diff = (a->len ^ b->len) | (a->mark ^ b->mark) |
	       (a->ctinfo ^ b->ctinfo) | (a->cap ^ b->cap);
	if (nfct != NO_NFCT && has_ct_mark)
		diff |= b->ct_mark ^ read_ct_mark(nfct);
	first = x[0] ^ y[0];
	second = x[1] ^ y[1];
	if (b->ethertype == ETH_P_IP)
		second &= bpf_cpu_to_be64(0x00ff0000ffffffff);
	else
		first &= bpf_cpu_to_be64(0xffffffffffffff00);
	diff |= first | second;
#pragma unroll
	for (int i = 2; i < PKT_DATA / 8; i++) {
		if (i == SHORT_WORDS && (a->cap | b->cap) <= i * 8)
			break;
		diff |= x[i] ^ y[i];
	}
	return !diff;
}

/* Whether a packet still has its Ethernet addresses. */
static __always_inline bool same_mac(const struct pkt *p, struct sk_buff *skb)
{
	u64 at = number(get(skb, head)) + get(skb, mac_header);
	const u64 *mac = (const void *)p->mac;

	/* 6 bytes each; what is behind them does not count. */
	return p->mac_len < 14 || !((mac[0] ^ read_u64(at)) |
				    ((mac[1] ^ read_u64(at + 8)) &
				     bpf_cpu_to_be64(0xffffffff00000000)));
}

#endif
