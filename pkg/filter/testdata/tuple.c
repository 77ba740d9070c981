// SPDX-License-Identifier: GPL-2.0
// The probes' parser of headers (bpf/tuple.h), made a program: it reads frames, each behind
// its length (u32), as the kernel holds them at a hook, and writes a pkt_tuple for each.
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// What bpf/kernel.h, maps.h and compat.h would give.
#define NFTRACE_KERNEL_H
#define NFTRACE_MAPS_H
#define NFTRACE_COMPAT_H
typedef unsigned long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define bpf_ntohs(x)	__builtin_bswap16(x)
#define ETH_P_IP	0x0800
#define ETH_P_ARP	0x0806
#define ETH_P_RARP	0x8035
#define ETH_P_IPV6	0x86dd

struct sk_buff {
	unsigned char *head, *data;
	u32 len, data_len;
	u16 network_header, mac_header, protocol;
	u16 tag; // 1 + VLAN id; 0: none
};

static const bool use_mac = true;

#define __verified_once_mem
#define get(p, field) ((p)->field)

static u16 vlan_of(struct sk_buff *skb)
{
	return skb->tag;
}

static u16 protocol_of(struct sk_buff *skb)
{
	return bpf_ntohs(skb->protocol);
}

static u64 number(const void *p)
{
	return (u64)p;
}

static int bpf_probe_read_kernel(void *to, u32 size, const void *from)
{
	memcpy(to, from, size);
	return 0;
}

#include "tuple.h"

#define HEADROOM 32

int main(void)
{
	u32 len;

	while (fread(&len, sizeof(len), 1, stdin) == 1) {
		// Behind the packet is something else, and no end of the memory.
		u32 size = HEADROOM + len + 320;
		struct sk_buff skb = { .head = malloc(size) };
		struct pkt_tuple t = {};
		unsigned char *frame = skb.head + HEADROOM;
		u32 l3 = 14;
		u16 type, tci;

		if (!skb.head)
			return 1;
		memset(skb.head, 0xa5, size);
		if (len < 18 || fread(frame, 1, len, stdin) != len)
			return 1;
		memcpy(&type, frame + 12, 2);
		if (type == bpf_ntohs(0x8100) || type == bpf_ntohs(0x88a8)) {
			// skb_vlan_untag: the tag goes beside, and the addresses move up.
			memcpy(&tci, frame + 14, 2);
			memcpy(&type, frame + 16, 2);
			skb.tag = (bpf_ntohs(tci) & 0xfff) + 1;
			memmove(frame + 4, frame, 12);
			frame += 4;
			len -= 4;
		}
		skb.mac_header = frame - skb.head;
		skb.network_header = skb.mac_header + l3;
		skb.protocol = type;
		skb.data = frame + l3;
		skb.len = len - l3;
		parse_tuple(&t, &skb);
		fwrite(&t, sizeof(t), 1, stdout);
		free(skb.head);
	}
	return 0;
}
