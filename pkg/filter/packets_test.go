package filter

import (
	"encoding/binary"
	"math/rand/v2"
)

// The values that packets and expressions are made of; few, so that they meet.
var (
	someIPv4  = [][4]byte{{10, 0, 0, 1}, {10, 1, 2, 3}, {192, 0, 2, 7}, {192, 168, 1, 255}, {0, 0, 0, 0}, {255, 255, 255, 255}, {10, 0, 0, 10}}
	someIPv6  = [][16]byte{{15: 1}, {0x20, 1, 0xd, 0xb8, 15: 1}, {0x20, 1, 0xd, 0xb8, 4: 0, 5: 1, 15: 0xff}, {0xfe, 0x80, 8: 2, 15: 1}, {0xff, 2, 15: 1}}
	someMACs  = [][6]byte{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, {0xde, 0xad, 0xbe, 0xef, 0, 1}}
	somePorts = []uint16{0, 1, 22, 53, 80, 443, 1023, 1024, 8080, 65535}
	someProto = []uint8{0, 1, 2, 6, 6, 6, 17, 17, 47, 50, 51, 58, 103, 112, 132, 132, 255}
	someTypes = []uint16{etherIPv4, etherIPv4, etherIPv4, etherIPv6, etherIPv6, etherIPv6, etherARP, etherRARP, 0x88cc, 0x8847, 0x0026}
	someVLANs = []uint16{0, 1, 5, 100, 4095}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

func cat(parts ...[]byte) []byte {
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// ethernet builds a frame; tags are the type and the TCI of VLAN tags.
func ethernet(dst, src [6]byte, typ uint16, l3 []byte, tags ...uint16) []byte {
	f := cat(dst[:], src[:])
	for _, t := range tags {
		f = append(f, be16(t)...)
	}
	return cat(f, be16(typ), l3)
}

// ipv4 builds a packet; the options' length is a multiple of 4.
func ipv4(proto uint8, src, dst [4]byte, frag uint16, options, l4 []byte) []byte {
	h := []byte{0x45 + byte(len(options)/4), 0, 0, 0, 0, 7, 0, 0, 64, proto, 0, 0}
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(options)+len(l4)))
	binary.BigEndian.PutUint16(h[6:], frag)
	return cat(h, src[:], dst[:], options, l4)
}

func ipv6(next uint8, src, dst [16]byte, payload []byte) []byte {
	h := []byte{0x60, 0, 0, 0, 0, 0, next, 64}
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	return cat(h, src[:], dst[:], payload)
}

func arp(op uint16, sha [6]byte, spa [4]byte, tha [6]byte, tpa [4]byte) []byte {
	return cat([]byte{0, 1, 8, 0, 6, 4}, be16(op), sha[:], spa[:], tha[:], tpa[:])
}

func tcp(sport, dport uint16, flags byte) []byte {
	return cat(be16(sport), be16(dport), make([]byte, 8), []byte{0x50, flags, 0, 1, 2, 3, 4, 5})
}

func udp(sport, dport uint16) []byte {
	return cat(be16(sport), be16(dport), []byte{0, 12, 0, 0, 1, 2, 3, 4})
}

func sctp(sport, dport uint16) []byte {
	return cat(be16(sport), be16(dport), make([]byte, 12))
}

func icmp(typ, code byte) []byte { return []byte{typ, code, 0, 0, 0, 1, 0, 1} }

// extension builds an IPv6 extension header of 8 bytes.
func extension(next uint8, payload []byte) []byte {
	return cat([]byte{next, 0, 1, 4, 0, 0, 0, 0}, payload)
}

func fragment(next uint8, offset uint16, payload []byte) []byte {
	return cat([]byte{next, 0}, be16(offset<<3|1), []byte{0, 0, 0, 7}, payload)
}

// handMade are the packets that a generator is unlikely to meet.
func handMade() [][]byte {
	m, a, b := someMACs, someIPv4, someIPv6
	v4 := func(l3 []byte, tags ...uint16) []byte { return ethernet(m[0], m[1], etherIPv4, l3, tags...) }
	v6 := func(l3 []byte, tags ...uint16) []byte { return ethernet(m[1], m[0], etherIPv6, l3, tags...) }
	syn := tcp(1024, 80, 0x02)
	packets := [][]byte{
		v4(ipv4(6, a[0], a[1], 0, make([]byte, 4), syn)),
		v4(ipv4(6, a[0], a[1], 0, make([]byte, 40), syn)),
		v4(ipv4(6, a[0], a[1], 0x2000, nil, syn)), // first fragment
		v4(ipv4(6, a[0], a[1], 0x4000, nil, syn)), // don't fragment
		v4(ipv4(6, a[0], a[1], 0x2001, nil, syn)), // later fragments
		v4(ipv4(6, a[0], a[1], 0x1fff, make([]byte, 8), syn)),
		v4(ipv4(17, a[1], a[0], 185, nil, udp(53, 53))),
		v4(ipv4(1, a[1], a[0], 185, nil, icmp(8, 0))),
		v4(ipv4(4, a[0], a[1], 0, nil, ipv4(6, a[1], a[0], 0, nil, syn))), // IP in IP
		v4(ipv4(1, a[0], a[1], 0, make([]byte, 12), icmp(3, 1))),
		v4(ipv4(58, a[0], a[1], 0, nil, icmp(128, 0))), // ICMPv6 over IPv4
		v6(ipv6(6, b[1], b[2], syn)),
		v6(ipv6(0, b[1], b[2], extension(6, syn))),
		v6(ipv6(60, b[1], b[2], extension(17, udp(53, 1024)))),
		v6(ipv6(43, b[1], b[2], extension(6, syn))),
		v6(ipv6(51, b[1], b[2], cat([]byte{6, 4, 0, 0}, make([]byte, 20), syn))),
		v6(ipv6(44, b[1], b[2], fragment(6, 0, syn))),
		v6(ipv6(44, b[1], b[2], fragment(17, 0, udp(53, 80)))),
		v6(ipv6(44, b[1], b[2], fragment(58, 0, icmp(128, 0)))),
		v6(ipv6(44, b[1], b[2], fragment(6, 9, syn))),
		v6(ipv6(44, b[1], b[2], fragment(44, 0, fragment(6, 0, syn)))),
		v6(ipv6(44, b[1], b[2], fragment(0, 0, extension(6, syn)))),
		v6(ipv6(0, b[1], b[2], extension(44, fragment(6, 0, syn)))),
		v6(ipv6(58, b[3], b[4], icmp(135, 0))),
		v6(ipv6(0, b[3], b[4], extension(58, icmp(143, 0)))),
		v6(ipv6(1, b[1], b[2], icmp(8, 0))), // ICMP over IPv6
		v6(ipv6(59, b[1], b[2], nil)),
		ethernet(m[2], m[0], etherARP, arp(1, m[0], a[0], [6]byte{}, a[1])),
		ethernet(m[0], m[1], etherARP, arp(2, m[1], a[1], m[0], a[0])),
		ethernet(m[2], m[0], etherRARP, arp(3, m[0], a[4], m[0], a[4])),
		ethernet(m[2], m[0], 0x0026, append([]byte{0x42, 0x42, 3}, make([]byte, 35)...)), // LLC
	}
	for _, tag := range []uint16{ether8021Q, ether8021AD, etherQinQ} {
		packets = append(packets,
			v4(ipv4(6, a[0], a[1], 0, nil, syn), tag, 5),
			v6(ipv6(17, b[1], b[2], udp(1024, 53)), tag, 0xe005),
			ethernet(m[2], m[0], etherARP, arp(1, m[0], a[0], [6]byte{}, a[1]), tag, 100),
			v4(ipv4(6, a[0], a[1], 0, nil, syn), tag, 5, ether8021Q, 6)) // double tag
	}
	for flags := range 256 {
		packets = append(packets, v4(ipv4(6, a[2], a[0], 0, nil, tcp(443, 8080, byte(flags)))))
	}
	for typ := range 20 {
		packets = append(packets, v4(ipv4(1, a[2], a[0], 0, nil, icmp(byte(typ), byte(typ%4)))))
	}
	for typ := 126; typ < 156; typ++ {
		packets = append(packets, v6(ipv6(58, b[3], b[2], icmp(byte(typ), byte(typ%3)))))
	}
	return packets
}

// truncated cuts packets at every length from the link header on.
func truncated() [][]byte {
	m, a, b := someMACs, someIPv4, someIPv6
	whole := [][]byte{
		ethernet(m[0], m[1], etherIPv4, ipv4(6, a[0], a[1], 0, nil, tcp(1024, 80, 0x12))),
		ethernet(m[0], m[1], etherIPv4, ipv4(17, a[0], a[1], 0, make([]byte, 8), udp(53, 80))),
		ethernet(m[0], m[1], etherIPv4, ipv4(1, a[0], a[1], 0, nil, icmp(8, 0))),
		ethernet(m[0], m[1], etherIPv6, ipv6(6, b[1], b[2], tcp(1024, 80, 0x12))),
		ethernet(m[0], m[1], etherIPv6, ipv6(44, b[1], b[2], fragment(6, 0, tcp(1024, 80, 0x12)))),
		ethernet(m[0], m[1], etherIPv6, ipv6(58, b[3], b[4], icmp(128, 0))),
		ethernet(m[0], m[1], etherARP, arp(1, m[0], a[0], [6]byte{}, a[1])),
		ethernet(m[0], m[1], etherIPv4, ipv4(6, a[0], a[1], 0, nil, tcp(1024, 80, 0x12)), ether8021Q, 5),
	}
	var cut [][]byte
	for _, f := range whole {
		start := 14
		if isVLANTag(binary.BigEndian.Uint16(f[12:])) {
			start = 18
		}
		for n := start; n < len(f); n++ {
			cut = append(cut, f[:n:n])
		}
	}
	return cut
}

// generate makes a random packet, most of the time a sensible one.
func generate(r *rand.Rand) []byte {
	var tags []uint16
	if r.IntN(5) == 0 {
		tags = []uint16{pick(r, []uint16{ether8021Q, ether8021Q, ether8021AD, etherQinQ}), pick(r, someVLANs) | uint16(r.IntN(8))<<13}
	}
	typ := pick(r, someTypes)
	var l3 []byte
	switch typ {
	case etherIPv4:
		proto := pick(r, someProto)
		frag := pick(r, []uint16{0, 0, 0, 0x4000, 0x2000, 0x2000 | uint16(r.IntN(0x2000)), 1, 0x1fff})
		l3 = ipv4(proto, pick(r, someIPv4), pick(r, someIPv4), frag, make([]byte, 4*pick(r, []int{0, 0, 0, 1, 10})), upper(r, proto))
		if r.IntN(20) == 0 {
			l3[0] = l3[0]&0xf0 | byte(r.IntN(16)) // a header length that is not true
		}
	case etherIPv6:
		next := pick(r, someProto)
		payload := upper(r, next)
		for r.IntN(4) == 0 {
			header := pick(r, []uint8{0, 43, 44, 60})
			if header == protoFrag {
				payload = fragment(next, pick(r, []uint16{0, 0, 185}), payload)
			} else {
				payload = extension(next, payload)
			}
			next = header
		}
		l3 = ipv6(next, pick(r, someIPv6), pick(r, someIPv6), payload)
	case etherARP, etherRARP:
		l3 = arp(uint16(1+r.IntN(4)), pick(r, someMACs), pick(r, someIPv4), pick(r, someMACs), pick(r, someIPv4))
	default:
		l3 = noise(r, 20+r.IntN(60))
	}
	f := ethernet(pick(r, someMACs), pick(r, someMACs), typ, l3, tags...)
	if r.IntN(10) == 0 {
		start := 14 + 2*len(tags)
		f = f[:start+r.IntN(len(f)-start)]
	}
	return f
}

// upper makes an upper-layer header.
func upper(r *rand.Rand, proto uint8) []byte {
	switch proto {
	case protoTCP:
		return tcp(pick(r, somePorts), pick(r, somePorts), byte(r.Uint32()))
	case protoUDP:
		return append(udp(pick(r, somePorts), pick(r, somePorts)), make([]byte, r.IntN(1400))...)
	case protoSCTP:
		return sctp(pick(r, somePorts), pick(r, somePorts))
	case protoICMP:
		return icmp(byte(r.IntN(20)), byte(r.IntN(3)))
	case protoICMPv6:
		return icmp(byte(126+r.IntN(30)), byte(r.IntN(3)))
	}
	return noise(r, r.IntN(40))
}

func noise(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}
