/* SPDX-License-Identifier: GPL-2.0 */
/* The parsed headers of a packet, which filter expressions look at. */
#ifndef NFTRACE_TUPLE_H
#define NFTRACE_TUPLE_H

#include "kernel.h"
#include "maps.h"
#include "compat.h"

/*
 * What pkg/filter compiles for: its Tuple says what each field means and how it is
 * filled (ParsePacket is the reference). Tests compare the layouts, and the two
 * parsers packet by packet.
 */
struct pkt_tuple {
	u8 saddr[16];
	u8 daddr[16];
	u32 len;
	u16 ethertype;
	u16 sport;
	u16 dport;
	u16 vlan;
	u16 frag_off;
	u16 flags;
	u8 smac[6];
	u8 dmac[6];
	u8 nexthdr;
	u8 frag_nexthdr;
	u8 tcp_flags;
	u8 icmp_type;
	u8 icmp_code;
	u8 l3_avail;
	u8 l4_avail;
	u8 pad;
};

#define TUPLE_VLAN 0x1
#define TUPLE_MAC  0x2

#define IPPROTO_ICMP   1
#define IPPROTO_TCP    6
#define IPPROTO_UDP    17
#define IPPROTO_FRAG   44
#define IPPROTO_ICMPV6 58
#define IPPROTO_SCTP   132

#define ETH_HLEN  14
#define VLAN_HLEN 4

/* Enough for IPv4 and IPv6 headers with 14 bytes of what follows. */
union headers {
	u8 b[64];
	u16 w[32];
};

static __always_inline void parse_l4(struct pkt_tuple *t, union headers *h,
				     u32 at, u32 avail, u8 icmp)
{
	switch (t->nexthdr) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		if (avail >= 2)
			t->sport = bpf_ntohs(h->w[at / 2]);
		if (avail >= 4)
			t->dport = bpf_ntohs(h->w[at / 2 + 1]);
		if (t->nexthdr == IPPROTO_TCP && avail >= 14)
			t->tcp_flags = h->b[at + 13];
		break;
	default:
		if (t->nexthdr != icmp)
			return;
		if (avail >= 1)
			t->icmp_type = h->b[at];
		if (avail >= 2)
			t->icmp_code = h->b[at + 1];
	}
	t->l4_avail = avail > 255 ? 255 : avail;
}

/* The headers from address l3 on, lin bytes of which are there. */
__verified_once_mem int parse_headers(struct pkt_tuple *t, u64 l3, u32 lin)
{
	union headers h;
	u32 ihl, l4;

	if (!t)
		return 0;
	/*
	 * Behind the linear part there is room enough to read (skb_shared_info), but
	 * nothing of the packet.
	 */
	if (lin < 20 || bpf_probe_read_kernel(&h, sizeof(h), (void *)l3))
		return 0;
	t->l3_avail = lin > 255 ? 255 : lin;

	switch (t->ethertype) {
	case ETH_P_IP:
		__builtin_memcpy(t->saddr, &h.b[12], 4);
		__builtin_memcpy(t->daddr, &h.b[16], 4);
		t->frag_off = bpf_ntohs(h.w[3]) & 0x1fff;
		t->nexthdr = h.b[9];
		ihl = (h.b[0] & 0xf) * 4;
		if (t->frag_off || ihl > lin)
			return 0;
		if (ihl != 20) {
			/* Put what follows the options where it is without. */
			if (bpf_probe_read_kernel(&h.b[20], 14,
						  (void *)l3 + ihl))
				return 0;
		}
		l4 = lin - ihl;
		parse_l4(t, &h, 20, l4, IPPROTO_ICMP);
		return 0;
	case ETH_P_IPV6:
		__builtin_memcpy(t->saddr, &h.b[8], 16);
		if (lin < 40) {
			t->l3_avail = 0;
			return 0;
		}
		__builtin_memcpy(t->daddr, &h.b[24], 16);
		t->nexthdr = h.b[6];
		if (t->nexthdr == IPPROTO_FRAG && lin > 40)
			t->frag_nexthdr = h.b[40];
		parse_l4(t, &h, 40, lin - 40, IPPROTO_ICMPV6);
		return 0;
	case ETH_P_ARP:
	case ETH_P_RARP:
		if (lin < 28)
			return 0;
		__builtin_memcpy(t->saddr, &h.b[14], 4);
		__builtin_memcpy(t->daddr, &h.b[24], 4);
	}
	return 0;
}

static __always_inline void parse_tuple(struct pkt_tuple *t,
					struct sk_buff *skb)
{
	u64 head = number(get(skb, head));
	u32 nh = get(skb, network_header), mh = get(skb, mac_header);
	u32 off = number(get(skb, data)) - head;
	u32 lin = get(skb, len) - get(skb, data_len) + off;
	u16 tag = vlan_of(skb);

	t->ethertype = protocol_of(skb);
	t->len = get(skb, len) + off - nh + ETH_HLEN;
	if (tag) {
		t->vlan = tag - 1;
		t->flags |= TUPLE_VLAN;
		t->len += VLAN_HLEN;
	}
	if (use_mac && mh != 0xffff && mh + ETH_HLEN <= nh) {
		struct {
			u8 dst[6], src[6];
		} eth;

		if (!bpf_probe_read_kernel(&eth, sizeof(eth),
					   (void *)(head + mh))) {
			__builtin_memcpy(t->dmac, eth.dst, 6);
			__builtin_memcpy(t->smac, eth.src, 6);
			t->flags |= TUPLE_MAC;
		}
	}
	parse_headers(t, head + nh, lin > nh ? lin - nh : 0);
}

#endif
