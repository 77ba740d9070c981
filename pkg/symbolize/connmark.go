package symbolize

// Modes of CONNMARK (enum in include/uapi/linux/netfilter/xt_connmark.h).
const (
	connmarkSet = iota
	connmarkSave
	connmarkRestore
)

// connmark is struct xt_connmark_tginfo1 or 2, of which the latter can shift.
type connmark struct {
	mark, ctMask, nfMask uint32
	mode, shift          uint8
}

// connmark reads the target CONNMARK of an entry; ok is false for another target, and where it
// is of no revision that is known.
func (e *Entry) connmark() (c connmark, ok bool) {
	if e.Kind != TargetExtension || e.Target != "CONNMARK" {
		return c, false
	}
	d := dec{b: e.Data}
	c.mark, c.ctMask, c.nfMask = d.u32(0), d.u32(4), d.u32(8)
	mode := 12
	if e.Revision >= 2 {
		c.shift, mode = d.u8(13), 14
	}
	c.mode = d.u8(mode)
	return c, (e.Revision == 1 || e.Revision == 2) && c.mode <= connmarkRestore && !d.bad
}

// RestoresMark reports whether e's target is CONNMARK --restore-mark, or may be.
func (e *Entry) RestoresMark() bool {
	if e.Kind != TargetExtension || e.Target != "CONNMARK" {
		return false
	}
	c, ok := e.connmark()
	return !ok || c.mode == connmarkRestore
}

// GivesTemplate reports whether e's target may give the packet a conntrack entry that is none yet, a
// template, which has a mark of its own.
func (e *Entry) GivesTemplate() bool {
	const noTrack = 1 // XT_CT_NOTRACK
	d := dec{b: e.Data}
	return e.Kind == TargetExtension && e.Target == "CT" && (d.u16(0)&noTrack == 0 || d.bad)
}

// leavesMarks lists the targets that change packets, but neither their marks nor those of their
// connections.
var leavesMarks = map[string]bool{
	"DNPT": true, "DSCP": true, "ECN": true, "HL": true, "SNPT": true, "TCPMSS": true, "TCPOPTSTRIP": true,
	"TOS": true, "TTL": true, "mangle": true,
}

// Marks are a packet's mark and its connection's on their way through targets. Each is known as
// far as it hangs on nothing but what the connection's was to begin with, which the state behind
// the way may tell: see Begin.
type Marks struct {
	// Tracked is whether the packet has a conntrack entry now. It has none in table raw.
	Tracked bool

	packet, conn markWord
	facts        []markFact
}

// markFact is what is known of a word: as far as mask goes it is seen.
type markFact struct {
	word       markWord
	seen, mask uint32
}

// markWord is a mark: bit by bit value, XORed with what the connection's mark was to begin with
// where of has a bit. Nobody knows the bits unknown.
type markWord struct{ value, of, unknown uint32 }

func (w markWord) and(mask uint32) markWord {
	return markWord{w.value & mask, w.of & mask, w.unknown & mask}
}

func (w markWord) xor(v markWord) markWord {
	return markWord{w.value ^ v.value, w.of ^ v.of, w.unknown | v.unknown}
}

var anyMark = markWord{unknown: ^uint32(0)}

// NewMarks are those of a packet that has a mark, and of its connection.
func NewMarks(packet uint32) Marks {
	return Marks{packet: markWord{value: packet}, conn: markWord{of: ^uint32(0)}}
}

// Meet takes them through an entry that the packet matched: first what its conditions say of them,
// then its target.
func (m *Marks) Meet(e *Entry) {
	for i := range e.Matches {
		m.match(&e.Matches[i])
	}
	if e.Kind != TargetExtension {
		return
	}
	switch {
	case e.Target == "MARK":
		// net/netfilter/xt_mark.c:mark_tg
		d := dec{b: e.Data}
		v, mask := d.u32(0), d.u32(4)
		m.packet = m.packet.and(^mask).xor(markWord{value: v})
		if e.Revision != 2 || d.bad {
			m.packet = anyMark
		}
	case e.Target == "CONNMARK":
		m.meetConnmark(e)
	case e.Modifies() && !leavesMarks[e.Target]:
		m.Lose()
	}
}

// match notes what a match says that the packet fits: of net/netfilter/xt_mark.c:mark_mt and
// xt_connmark.c:connmark_mt.
func (m *Marks) match(x *Match) {
	word := m.packet
	switch {
	case x.Name == "connmark" && m.Tracked:
		word = m.conn
	case x.Name != "mark":
		return
	}
	d := dec{b: x.Data}
	f := markFact{word, d.u32(0), d.u32(4)}
	if inverted := d.u8(8) != 0; x.Revision == 1 && !inverted && !d.bad {
		m.facts = append(m.facts[:len(m.facts):len(m.facts)], f)
	}
}

// meetConnmark mirrors net/netfilter/xt_connmark.c:connmark_tg_shift.
func (m *Marks) meetConnmark(e *Entry) {
	c, ok := e.connmark()
	switch {
	case !ok:
		m.Lose()
	case !m.Tracked:
	case c.mode == connmarkRestore:
		m.packet = m.packet.and(^c.nfMask).xor(shifted(m.conn.and(c.ctMask), c.shift))
	case c.mode == connmarkSave:
		m.conn = m.conn.and(^c.ctMask).xor(shifted(m.packet.and(c.nfMask), c.shift))
	default:
		m.conn = shifted(m.conn.and(^c.ctMask).xor(markWord{value: c.mark}), c.shift)
	}
}

// shifted gives up a word that is shifted, for then its bits hang on others.
func shifted(w markWord, by uint8) markWord {
	if by != 0 {
		return anyMark
	}
	return w
}

// Lose forgets both, for nobody knows what was done to them.
func (m *Marks) Lose() { m.packet, m.conn = anyMark, anyMark }

// LoseConn forgets the connection's.
func (m *Marks) LoseConn() { m.conn = anyMark }

// ConnMark is what is known of what the connection's mark was to begin with.
type ConnMark struct{ Value, Known uint32 }

// Seen are the marks of a packet and its connection as they were seen behind their way.
type Seen struct{ Packet, Conn uint32 }

// Begin tells what the connection's mark was to begin with, given what is known of it already, from
// what rules said of the marks, and from what the way made of them, if that was seen. ok is
// false where that does not fit: somebody else had a hand in it.
func (m *Marks) Begin(had ConnMark, seen *Seen) (begin ConnMark, ok bool) {
	begin = had
	facts := m.facts
	if seen != nil {
		facts = append(facts[:len(facts):len(facts)], markFact{m.conn, seen.Conn, ^uint32(0)}, markFact{m.packet, seen.Packet, ^uint32(0)})
	}
	for _, f := range facts {
		// The bits of what it was, as far as this tells.
		v, known := f.word.value^f.seen, f.mask&^f.word.unknown
		if v&known&^f.word.of != 0 {
			return ConnMark{}, false
		}
		known &= f.word.of
		if (v^begin.Value)&known&begin.Known != 0 {
			return ConnMark{}, false
		}
		begin.Value = begin.Value&begin.Known | v&known&^begin.Known
		begin.Known |= known
	}
	return begin, true
}

// Packet is the packet's mark, given what is known of what its connection's was; ok is false where
// that is not enough.
func (m *Marks) Packet(begin ConnMark) (mark uint32, ok bool) {
	w := m.packet
	return w.value ^ begin.Value&w.of, w.unknown == 0 && w.of&^begin.Known == 0
}
