package symbolize

import "net/netip"

// PacketInfo is what a rule's own conditions (ipt_ip, ip6t_ip6, arpt_arp) look at.
type PacketInfo struct {
	Src, Dst netip.Addr // of the table's family
	// ARP is an ARP packet of a device with addresses of 6 bytes (Ethernet); Src, Dst,
	// Proto and Frag are not looked at in tables of that family.
	ARP *[ARPLen]byte
	// Proto is the IPv4 header's protocol; for IPv6 the protocol behind the
	// extension headers (what ipv6_find_hdr finds), and -1 where it is unknown.
	Proto int
	// In and Out are the hook's devices, "" for none.
	In, Out string
	// Frag is set for fragments other than the first.
	Frag bool
}

// Plausible reports whether a packet passes entry i's own conditions:
// addresses, interfaces, protocol, fragment. Matches are not looked at. It
// mirrors net/ipv4/netfilter/ip_tables.c:ip_packet_match and
// net/ipv6/netfilter/ip6_tables.c:ip6_packet_match.
func (t *Table) Plausible(i int, p PacketInfo) bool {
	h := &t.Entries[i].Header
	if t.Family == ARP {
		return h.arpPlausible(&p)
	}
	inverted := func(bit uint8) bool { return h.InvFlags&bit != 0 }
	if sameMasked(p.Src, h.Src, h.SrcMask) == inverted(invSrc) ||
		sameMasked(p.Dst, h.Dst, h.DstMask) == inverted(invDst) ||
		sameIface(p.In, h.inIface, h.inMask) == inverted(invIn) ||
		sameIface(p.Out, h.outIface, h.outMask) == inverted(invOut) {
		return false
	}
	if t.Family == IPv6 {
		if h.Flags&ip6FlagProto == 0 || p.Proto < 0 {
			return true
		}
		if int(h.Proto) == p.Proto {
			return !inverted(invProto)
		}
		return h.Proto == 0 || inverted(invProto)
	}
	if h.Proto != 0 && p.Proto >= 0 && (p.Proto == int(h.Proto)) == inverted(invProto) {
		return false
	}
	// As NF_INVF does: an inverted condition without the flag never holds.
	fails := h.Flags&ip4FlagFrag != 0 && !p.Frag
	return fails == inverted(invFrag)
}

// LooksAtPacket reports whether entry i's own conditions look at more of a packet than the
// devices: only then does what Plausible says depend on it.
func (t *Table) LooksAtPacket(i int) bool {
	h := &t.Entries[i].Header
	if t.Family == ARP {
		if a := h.arp; a.inv&^(arpInvIn|arpInvOut) != 0 || !a.matchesAny() {
			return true
		}
	} else if t.Family == IPv6 {
		if h.Flags&ip6FlagProto != 0 {
			return true
		}
	} else if h.Proto != 0 || h.Flags&ip4FlagFrag != 0 {
		return true
	}
	return h.InvFlags&(invSrc|invDst|invProto|invFrag) != 0 ||
		!allZero(h.Src) || !allZero(h.SrcMask) || !allZero(h.Dst) || !allZero(h.DstMask)
}

// sameMasked reports addr & mask == want, as the kernel compares them (a want
// with bits outside its mask is never met).
func sameMasked(a netip.Addr, want, mask []byte) bool {
	b := a.AsSlice()
	if len(b) != len(want) {
		// No address is known: only a condition that holds for all holds.
		return allZero(want) && allZero(mask)
	}
	for i := range b {
		if b[i]&mask[i] != want[i] {
			return false
		}
	}
	return true
}

// sameIface mirrors include/linux/netfilter/x_tables.h:ifname_compare_aligned.
func sameIface(name string, want, mask []byte) bool {
	for i := range want {
		var c byte
		if i < len(name) {
			c = name[i]
		}
		if (c^want[i])&mask[i] != 0 {
			return false
		}
	}
	return true
}
