package render

import (
	"bytes"
	"encoding/binary"

	"github.com/nftrace/nftrace/pkg/events"
)

// Much of a line is the same as in lines before it: the devices are those of the place, and
// an IPv4 packet that was forwarded, or the next one of its flow, often differs from the one
// before in its TTL and identification only. reuse is what logBuf keeps of what it printed,
// to print that again.
type reuse struct {
	old    []byte // b before, while b is made of it
	rest   int    // where in b the IPv4 header begins, behind devices and MAC
	used   int    // how many bytes of the packet were looked at
	ttl    span   // where in b the TTL stands; at is 0 if it does not
	id     span   // where the identification stands, behind the TTL and idLabel
	alike  alike
	places [8]placeText
	next   int // of places to be written over

	macOf, macText []byte // a MAC header, and what is printed of it
}

// idLabel stands between the TTL and the identification.
const idLabel = " ID="

// span is where a number stands.
type span struct{ at, end int }

// placeText is what packetCommon prints of a place.
type placeText struct {
	place  *events.Place
	physIn string // its name may become known later
	text   []byte
	plain  bool // printable
}

// devices prints what packetCommon does, and tells whether it is printable.
func (m *logBuf) devices(p *events.Place) (plain bool) {
	for i := range m.places {
		if t := &m.places[i]; t.place == p && t.physIn == p.PhysIn.Name {
			m.b = append(m.b, t.text...)
			return t.plain
		}
	}
	start := len(m.b)
	m.packetCommon(p)
	t := &m.places[m.next]
	m.next = (m.next + 1) % len(m.places)
	*t = placeText{place: p, physIn: p.PhysIn.Name, text: append(t.text[:0], m.b[start:]...)}
	t.plain = printable(t.text)
	return t.plain
}

// addMAC prints a MAC header.
func (m *logBuf) addMAC(a []byte) {
	if m.short {
		return
	}
	if !bytes.Equal(a, m.macOf) {
		m.macOf = append(m.macOf[:0], a...)
		m.macText = appendMAC(m.macText[:0], a)
	}
	m.b = append(m.b, m.macText...)
}

// alike is all of an IPv4 packet that ipv4 looked at when it printed it whole, so that
// another one can be held against it.
type alike struct {
	ok       bool
	hasOwner bool
	len      int
	captured int
	mark     uint32
	uid, gid uint32
	data     []byte // as far as it was looked at
}

// like remembers the packet of which so many bytes were looked at.
func (a *alike) like(p *events.Packet, used int) {
	*a = alike{
		ok: true, hasOwner: p.HasOwner, len: p.Len, captured: len(p.Data), mark: p.Mark, uid: p.UID, gid: p.GID,
		data: append(a.data[:0], p.Data[:used]...),
	}
}

// to tells whether p prints at s as the packet that is remembered, but for devices and MAC,
// the TTL and the identification (and the checksum, which is not printed).
func (a *alike) to(s *events.Step, p *events.Packet) bool {
	if s.PF != events.PFIPv4 || p.MACDevType == arphrdSIT || a.len != p.Len || a.captured != len(p.Data) ||
		a.mark != p.Mark || a.hasOwner != p.HasOwner || a.hasOwner && (a.uid != p.UID || a.gid != p.GID) {
		return false
	}
	x, y := a.data, p.Data[:len(a.data)]
	return binary.NativeEndian.Uint32(x) == binary.NativeEndian.Uint32(y) &&
		binary.NativeEndian.Uint16(x[6:]) == binary.NativeEndian.Uint16(y[6:]) &&
		x[9] == y[9] && bytes.Equal(x[12:], y[12:])
}

// again makes m hold p at s, which is alike to the packet that it holds.
func (m *logBuf) again(s *events.Step, p *events.Packet) {
	m.b, m.old = m.old[:0], m.b
	old, rest, ttl, id := m.old, m.rest, m.ttl, m.id
	m.plain = m.devices(s.Place)
	if s.In.Index != 0 {
		m.macHeader(p)
	}
	m.rest = len(m.b)
	b := append(m.b, old[rest:ttl.at]...)
	m.ttl.at = len(b)
	b = appendDec(b, uint32(p.Data[8]))
	m.ttl.end = len(b)
	b = append(b, idLabel...)
	m.id.at = len(b)
	b = appendDec(b, uint32(be16(p.Data, 4)))
	m.id.end = len(b)
	m.b = append(b, old[id.end:]...)
	m.whole = m.plain && len(m.b) < logLineLen-logPrefixLen
	m.alike.ok = m.whole
}
