package symbolize

import "encoding/binary"

// ebtConditions is what a rule asks that another rule of the same run can change the answer to.
// Whatever else it asks has one answer for a run.
type ebtConditions struct {
	varies    bool // is asked of more than the packet (limit), or not known to nftrace
	link      bool // what dnat, snat and redirect change: addresses, the packet's type
	marks     []ebtMark
	onlyMarks bool // nothing else is asked
}

// ebtMark is struct ebt_mark_m_info.
type ebtMark struct {
	mark, mask uint64
	not, any   bool // any: a bit of mask is set
}

// holds mirrors net/bridge/netfilter/ebt_mark_m.c:ebt_mark_mt.
func (m *ebtMark) holds(mark uint64) bool {
	if m.any {
		return (mark&m.mask != 0) != m.not
	}
	return (mark&m.mask == m.mark) != m.not
}

// ebtSet is struct ebt_mark_t_info: how target mark changes the packet's mark.
type ebtSet struct {
	mark uint64
	how  uint32
}

// apply mirrors net/bridge/netfilter/ebt_mark.c:ebt_mark_tg.
func (s *ebtSet) apply(mark uint64) uint64 {
	switch s.how {
	case ebtMarkSet:
		mark = s.mark
	case ebtMarkOr:
		mark |= s.mark
	case ebtMarkAnd:
		mark &= s.mark
	default: // ebtMarkXor
		mark ^= s.mark
	}
	return uint64(uint32(mark)) // skb->mark
}

// The upper bits of a verdict of target mark (MARK_*_VALUE).
const (
	ebtMarkSet = 0xf0
	ebtMarkOr  = 0xe0
	ebtMarkAnd = 0xd0
	ebtMarkXor = 0xc0
)

// addHeader takes what every rule can ask (struct ebt_entry).
func (c *ebtConditions) addHeader(b []byte, conditions bool) {
	c.onlyMarks = !conditions
	c.link = binary.NativeEndian.Uint32(b)&(ebtFlagSrc|ebtFlagDst) != 0
}

// add takes a match.
func (c *ebtConditions) add(name string, data []byte) {
	switch name {
	case "mark_m":
		// mark, mask, invert, bitmask: EBT_MARK_AND is 1, EBT_MARK_OR 2
		if len(data) >= 18 {
			c.marks = append(c.marks, ebtMark{
				mark: binary.NativeEndian.Uint64(data), mask: binary.NativeEndian.Uint64(data[8:]),
				not: data[16] != 0, any: data[17]&2 != 0,
			})
			return
		}
		c.varies = true
	case "ip", "ip6", "802_3", "vlan", "stp":
	case "among", "arp", "pkttype":
		c.link = true
	default:
		c.varies = true
	}
	c.onlyMarks = false
}

// EBTMarks are a packet's marks before a run of a table and behind it.
type EBTMarks struct{ Before, Behind uint32 }

// LooksAtMark tells whether a rule of the table asks for the packet's mark.
func (t *EBTTable) LooksAtMark() bool {
	for _, r := range t.Rules {
		if len(r.conditions.marks) > 0 {
			return true
		}
	}
	return false
}
