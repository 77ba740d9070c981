package render

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"

	"github.com/nftrace/nftrace/pkg/events"
)

// raw joins hex strings; blanks in them are for the reader.
func raw(parts ...string) []byte {
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "", "\t", "").Replace(strings.Join(parts, "")))
	if err != nil {
		panic(err)
	}
	return b
}

// v4 is an IPv4 header and what follows it, id 123, DF unless frag says otherwise.
type v4 struct {
	tos   byte
	id    uint16
	frag  uint16 // flags and offset
	ttl   byte
	proto byte
	src   string
	dst   string
	opts  []byte
	l4    []byte
}

func (h v4) bytes() []byte {
	b := make([]byte, 20, 60)
	n := 20 + len(h.opts)
	b[0] = 0x40 | byte(n/4)
	b[1] = h.tos
	binary.BigEndian.PutUint16(b[2:], uint16(n+len(h.l4)))
	binary.BigEndian.PutUint16(b[4:], h.id)
	binary.BigEndian.PutUint16(b[6:], h.frag)
	b[8], b[9] = h.ttl, h.proto
	s, d := netip.MustParseAddr(h.src).As4(), netip.MustParseAddr(h.dst).As4()
	copy(b[12:], s[:])
	copy(b[16:], d[:])
	return append(append(b, h.opts...), h.l4...)
}

type v6 struct {
	first string // four bytes: version, class, flow label
	next  byte
	hop   byte
	src   string
	dst   string
	rest  []byte // extension headers and what follows
}

func (h v6) bytes() []byte {
	b := make([]byte, 40, 100)
	copy(b, raw(h.first))
	binary.BigEndian.PutUint16(b[4:], uint16(len(h.rest)))
	b[6], b[7] = h.next, h.hop
	s, d := netip.MustParseAddr(h.src).As16(), netip.MustParseAddr(h.dst).As16()
	copy(b[8:], s[:])
	copy(b[24:], d[:])
	return append(b, h.rest...)
}

func pkt4(b []byte) events.Packet {
	return events.Packet{Family: events.PFIPv4, EtherType: 0x0800, Len: len(b), Data: b, MACDevType: 1, VLAN: -1}
}

func pkt6(b []byte) events.Packet {
	return events.Packet{Family: events.PFIPv6, EtherType: 0x86dd, Len: len(b), Data: b, MACDevType: 1, VLAN: -1}
}

func with(p events.Packet, f func(*events.Packet)) events.Packet {
	f(&p)
	return p
}

const (
	c1 = "172.17.0.2"
	c2 = "172.17.0.3"
	g1 = "2001:db8::1"
	g2 = "fe80::42:acff:fe11:2"
)

var (
	// type 8, code 0, id 5, seq 1
	echo     = raw("0800 f7f9 0005 0001", strings.Repeat("00", 56))
	echo4    = v4{id: 123, frag: 0x4000, ttl: 64, proto: 1, src: c2, dst: c1, l4: echo}
	dockMAC  = raw("0242ac110002 0242ac110003 0800")
	tcpOpts  = raw("020405b4 0402080a 000186a0 00000000 01030307")
	tcpSYN   = raw("9c40 3039  499602d2  00000000  a0 02 faf0 0000 0000")
	synBytes = append(append([]byte{}, tcpSYN...), tcpOpts...)
	udp53    = raw("8ae7 0035 0010 0000 0102030405060708")
)
