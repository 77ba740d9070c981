package render

import (
	"bytes"
	"encoding/binary"

	"github.com/nftrace/nftrace/pkg/events"
)

// Packets of one flow mostly meet the same rules at the same places, and are there as the
// ones before them were but for their identification. lines is what was printed of a part
// of a hook's call, to print it again for the next packet.
type lines struct {
	place  *events.Place
	physIn string // its name may become known later
	tables []rulesMet

	// Of the packet:
	alike alike
	ttl   byte
	mac   []byte

	// text is empty until a second packet was like that: many flows have none.
	text []byte
	// ids is where in text the identifications end, which have so many digits.
	ids    []int
	digits int
}

// rulesMet are the rules that a table's run met. Runs that did the same share them, and
// nobody changes them.
type rulesMet struct {
	first *events.Rule
	n     int
}

const (
	// linesBits is how many lines are kept, as a power of 2. All have a place, which others
	// may take from them.
	linesBits = 8
	// maxLines bounds how long those are: each has less than logLineLen bytes.
	maxLines = 64
)

// linesAt is where the lines of a part are kept, and the packet that they are about. It is
// nil if they are not kept.
func (m *logBuf) linesAt(part []events.Step) (*lines, *events.Packet) {
	if m.lines == nil {
		return nil, nil
	}
	s, n := &part[0], 0
	var p *events.Packet
	for i := range part {
		t := part[i].Table
		n += len(t.Rules)
		if part[i].Place != s.Place || t.Unresolved != "" || len(t.Rules) == 0 || n > maxLines || len(t.Met) != 1 || t.Met[0].From != 0 {
			return nil, nil
		}
		switch q := t.Met[0].Pkt; {
		case q == nil:
			return nil, nil
		case p == nil:
			p = q
		case !same(p, q):
			return nil, nil
		}
	}
	if s.PF != events.PFIPv4 || len(p.Data) < 24 {
		return nil, nil
	}
	const prime = 0x9e3779b97f4a7c15
	addrs, ports := p.Data[12:20], p.Data[20:24]
	h := (binary.NativeEndian.Uint64(addrs) ^ s.Table.ID.Gen) * prime
	h ^= uint64(binary.NativeEndian.Uint32(ports))<<8 ^ uint64(s.Hook)
	return &m.lines[h*prime>>(64-linesBits)], p
}

// same tells whether two packets of a part are one, of which conntrack may have come to
// know more.
func same(p, q *events.Packet) bool {
	return p == q || len(p.Data) > 0 && len(p.Data) == len(q.Data) && &p.Data[0] == &q.Data[0] &&
		p.Len == q.Len && p.Mark == q.Mark
}

// of tells whether the lines are those of a part, but for the packet's identification.
func (l *lines) of(part []events.Step, p *events.Packet) bool {
	s := &part[0]
	if l.place != s.Place || l.physIn != s.PhysIn.Name || len(l.tables) != len(part) {
		return false
	}
	for i := range l.tables {
		x, rules := &l.tables[i], part[i].Table.Rules
		if x.first != &rules[0] || x.n != len(rules) {
			return false
		}
	}
	return l.ttl == p.Data[8] && bytes.Equal(l.mac, p.MAC) && l.alike.to(s, p)
}

// see remembers a part, and of its packet what m looked at to print it.
func (l *lines) see(m *logBuf, part []events.Step, p *events.Packet) {
	s := &part[0]
	l.place, l.physIn, l.tables, l.text = s.Place, s.PhysIn.Name, l.tables[:0], l.text[:0]
	for i := range part {
		rules := part[i].Table.Rules
		l.tables = append(l.tables, rulesMet{&rules[0], len(rules)})
	}
	data := append(l.alike.data[:0], m.alike.data...)
	l.alike = m.alike
	l.alike.data = data
	l.ttl, l.mac = p.Data[8], append(l.mac[:0], p.MAC...)
}

// keep keeps the text of a part whose packet m holds, if each line is a rule's TracePrefix
// and the packet.
func (l *lines) keep(m *logBuf, part []events.Step, text []byte) {
	l.text, l.ids = l.text[:0], l.ids[:0]
	at := 0
	for i := range part {
		for k := range part[i].Table.Rules {
			prefix := part[i].Table.Rules[k].TracePrefix
			if prefix == "" {
				return
			}
			at += len(prefix)
			l.ids = append(l.ids, at+m.id.end)
			at += len(m.b) + len("\n")
		}
	}
	l.text, l.digits = append(l.text, text...), m.id.end-m.id.at
}

// again adds the text for a packet whose identification has as many digits.
func (l *lines) again(b []byte, id uint32) []byte {
	const word = 8
	start := len(b)
	b = append(b, l.text...)
	text := b[start:]
	// With what stands before it, which is the same in all lines, it fills a word.
	first := text[l.ids[0]-word:][:word]
	appendDec(first[:word-l.digits], id)
	w := binary.NativeEndian.Uint64(first)
	for _, end := range l.ids[1:] {
		binary.NativeEndian.PutUint64(text[end-word:], w)
	}
	return b
}

// decLen is how many digits appendDec writes.
func decLen(id uint16) int {
	switch {
	case id < 10:
		return 1
	case id < 100:
		return 2
	case id < 1000:
		return 3
	case id < 10000:
		return 4
	}
	return 5
}
