package filter

import (
	"encoding/binary"
)

// Bits of Tuple.Flags.
const (
	// FlagVLAN says that the frame has a VLAN tag and Tuple.VLAN its id.
	FlagVLAN = 1 << 0
	// FlagMAC says that Tuple.SMAC and Tuple.DMAC are valid. Where it is clear
	// (a packet that has not met a link yet), "ether host" and its kin are false.
	FlagMAC = 1 << 1
)

// Tuple is what a filter function sees of a packet: the struct pkt_tuple that
// the BPF side fills and passes by pointer. Both have the byte order of the
// host, except where said otherwise.
//
// How it is filled (ParsePacket is the reference):
//
//   - L3 is what follows the Ethernet header and one VLAN tag. EtherType is
//     the type behind that tag, wherever the tag is kept (beside the skb or
//     still inside the frame). A second tag is not followed: EtherType is then
//     0x8100 or 0x88a8.
//   - A field whose bytes are not there is 0. L3Avail and L4Avail say which are
//     there. A filter that needs a byte which is not there does not match, not
//     even under not; so does a classic BPF program. A filler that cannot read
//     the whole IPv4, IPv6 or ARP header may leave L3Avail 0.
//   - IPv4 options are skipped: L4 begins 4 * IHL bytes into L3.
//   - IPv6 extension headers are not walked, because libpcap does not walk
//     them: L4 begins 40 bytes into L3, and is there only if NextHdr is
//     an upper-layer protocol. Behind hop-by-hop, routing, destination options,
//     AH or fragment headers (even that of a first fragment) there is none.
//   - L4Avail is 0 as well in an IPv4 fragment other than the first, and for a
//     protocol other than TCP, UDP, SCTP, ICMP (on IPv4), ICMPv6 (on IPv6).
type Tuple struct {
	SAddr       [16]byte // network order; IPv4 and the sender protocol address of (R)ARP in the first 4 bytes
	DAddr       [16]byte // likewise; target protocol address of (R)ARP
	Len         uint32   // bytes of the frame: L3 + 14, + 4 with a VLAN tag
	EtherType   uint16   // 0x0800 IPv4, 0x86dd IPv6, 0x0806 ARP, 0x8035 RARP …
	SPort       uint16   // TCP, UDP, SCTP: bytes 0 and 1 of L4
	DPort       uint16   // bytes 2 and 3 of L4
	VLAN        uint16   // 12-bit VLAN id, where FlagVLAN
	FragOff     uint16   // IPv4: 13-bit fragment offset in units of 8 bytes; else 0
	Flags       uint16   // Flag bits
	SMAC        [6]byte  // where FlagMAC
	DMAC        [6]byte  // where FlagMAC
	NextHdr     uint8    // IPv4: protocol; IPv6: next header of the fixed header
	FragNextHdr uint8    // IPv6: next header of the fragment header if NextHdr is 44, else 0 (byte 40 of L3)
	TCPFlags    uint8    // TCP: byte 13 of L4
	ICMPType    uint8    // ICMP, ICMPv6: byte 0 of L4
	ICMPCode    uint8    // ICMP, ICMPv6: byte 1 of L4
	L3Avail     uint8    // bytes that can be read from the start of L3 on, at most 255
	L4Avail     uint8    // bytes that can be read from the start of L4 on, at most 255
	_           uint8
}

// Values of Tuple.EtherType and Tuple.NextHdr that a filter can name.
const (
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherRARP = 0x8035
	etherIPv6 = 0x86dd

	etherATalk = 0x809b
	etherAARP  = 0x80f3

	ether8021Q  = 0x8100
	ether8021AD = 0x88a8
	etherQinQ   = 0x9100

	protoICMP   = 1
	protoIGMP   = 2
	protoTCP    = 6
	protoUDP    = 17
	protoFrag   = 44
	protoESP    = 50
	protoAH     = 51
	protoICMPv6 = 58
	protoPIM    = 103
	protoVRRP   = 112
	protoSCTP   = 132
)

// isVLANTag reports whether libpcap takes the Ethernet type for that of a VLAN tag.
func isVLANTag(etherType uint16) bool {
	return etherType == ether8021Q || etherType == ether8021AD || etherType == etherQinQ
}

// ParsePacket fills a Tuple from an Ethernet frame without frame check
// sequence. It is the reference for the BPF side. The frame may be cut anywhere
// behind its Ethernet header and VLAN tag; a shorter one gives a Tuple that has
// only Len.
func ParsePacket(frame []byte) Tuple {
	t := Tuple{Len: uint32(len(frame))}
	if len(frame) < 14 {
		return t
	}
	t.Flags |= FlagMAC
	copy(t.DMAC[:], frame[0:])
	copy(t.SMAC[:], frame[6:])
	t.EtherType = binary.BigEndian.Uint16(frame[12:])
	l3 := frame[14:]
	if isVLANTag(t.EtherType) && len(l3) >= 4 {
		t.Flags |= FlagVLAN
		t.VLAN = binary.BigEndian.Uint16(l3) & 0xfff
		t.EtherType = binary.BigEndian.Uint16(l3[2:])
		l3 = l3[4:]
	}
	t.L3Avail = saturate(len(l3))

	switch t.EtherType {
	case etherIPv4:
		t.parseIPv4(l3)
	case etherIPv6:
		t.parseIPv6(l3)
	case etherARP, etherRARP:
		copy(t.SAddr[:4], tail(l3, 14))
		copy(t.DAddr[:4], tail(l3, 24))
	}
	return t
}

func (t *Tuple) parseIPv4(l3 []byte) {
	copy(t.SAddr[:4], tail(l3, 12))
	copy(t.DAddr[:4], tail(l3, 16))
	if len(l3) >= 8 {
		t.FragOff = binary.BigEndian.Uint16(l3[6:]) & 0x1fff
	}
	if len(l3) < 10 {
		return
	}
	t.NextHdr = l3[9]
	if t.FragOff == 0 {
		t.parseL4(tail(l3, 4*int(l3[0]&0xf)), protoICMP)
	}
}

func (t *Tuple) parseIPv6(l3 []byte) {
	copy(t.SAddr[:], tail(l3, 8))
	copy(t.DAddr[:], tail(l3, 24))
	if len(l3) < 7 {
		return
	}
	t.NextHdr = l3[6]
	l4 := tail(l3, 40)
	if t.NextHdr == protoFrag && len(l4) > 0 {
		t.FragNextHdr = l4[0]
	}
	t.parseL4(l4, protoICMPv6)
}

// parseL4 reads the upper-layer header; icmp is the number of ICMP below this L3.
func (t *Tuple) parseL4(l4 []byte, icmp uint8) {
	switch t.NextHdr {
	case protoTCP, protoUDP, protoSCTP:
		if len(l4) >= 2 {
			t.SPort = binary.BigEndian.Uint16(l4)
		}
		if len(l4) >= 4 {
			t.DPort = binary.BigEndian.Uint16(l4[2:])
		}
		if t.NextHdr == protoTCP && len(l4) >= 14 {
			t.TCPFlags = l4[13]
		}
	case icmp:
		if len(l4) >= 1 {
			t.ICMPType = l4[0]
		}
		if len(l4) >= 2 {
			t.ICMPCode = l4[1]
		}
	default:
		return
	}
	t.L4Avail = saturate(len(l4))
}

// tail returns what of b lies at off and behind it, which may be nothing.
func tail(b []byte, off int) []byte {
	return b[min(off, len(b)):]
}

func saturate(n int) uint8 {
	return uint8(min(n, 255))
}
