package main

import (
	"encoding/binary"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/render"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// maxPaths bounds what is kept for all rulesets together.
const maxPaths = 1 << 14

// roomForPath is to be called before a path is kept: where there are too many, all are forgotten.
func (r *resolver) roomForPath() {
	if r.paths++; r.paths <= maxPaths {
		return
	}
	r.paths = 1
	r.tables.each(func(rs *ruleset) { rs.paths = pathCache{} })
	r.nft.each(func(rs *nftRuleset) { clear(rs.paths) })
	r.eb.each(func(rs *ebtRuleset) { clear(rs.paths) })
}

// knownPath is what walk made of a run, with the texts of the rules.
type knownPath struct {
	*symbolize.Path
	verdict  int           // the table's
	rules    []events.Rule // without the packets
	modifies bool          // one of them may have changed the packet
	plain    bool          // none of them changed its addresses
	looked   bool          // rules were held against its addresses
	key      string        // in pathCache
}

// taken fills in a run that took the path.
func (k *knownPath) taken(s *events.Step) {
	s.Verdict = k.verdict
	s.Table.Hotdrop = k.Hotdrop
	s.Table.Rules = k.rules
}

// pathCache keeps the paths through one ruleset: packets of one flow take the same
// way. The key is all that walk looks at.
type pathCache struct {
	all map[string]*knownPath
	// last is, for each hook, the path that was used last: mostly it is used again.
	last [symbolize.NumHooks]*knownPath
}

func (c *pathCache) get(hook uint8, key []byte) *knownPath {
	if int(hook) >= len(c.last) {
		return nil
	}
	k := c.last[hook]
	if k == nil || k.key != string(key) {
		if k = c.all[string(key)]; k != nil {
			c.last[hook] = k
		}
	}
	return k
}

func (c *pathCache) put(key []byte, p *knownPath) {
	if c.all == nil {
		c.all = map[string]*knownPath{}
	}
	p.key = string(key)
	c.all[p.key] = p
}

// pathKey appends what tells the path of a run: where it was, what it did, and what the
// rules' own conditions look at. The byte counters are not part of it: see bytesFit.
func pathKey(b []byte, s *events.Step, plain bool) []byte {
	b = append(b, s.Hook, byte(s.Verdict), byte(s.Table.Part.Verdict))
	b = binary.NativeEndian.AppendUint32(b, uint32(len(s.Table.Hits)))
	for i := range s.Table.Hits {
		h := &s.Table.Hits[i]
		// Neither has more than 32 bits: packets are sums of at most 512 numbers of 16.
		b = binary.NativeEndian.AppendUint64(b, uint64(h.Index)<<32|h.Packets)
	}
	if !plain {
		return append(b, 0)
	}
	p := packetAt(s)
	if arp := arpOf(p); s.PF == events.PFARP && arp != nil {
		b = append(append(b, 3), arp...)
	} else if p.Family == events.PFIPv4 && len(p.Data) >= 20 {
		// packetInfo, without taking the header apart.
		later := p.Data[6]&0x1f | p.Data[7]
		b = append(b, 4, p.Data[9], min(later, 1))
		b = append(b, p.Data[12:20]...)
	} else if info, ok := packetInfo(s); ok {
		src, dst := info.Src.As16(), info.Dst.As16()
		b = append(append(append(b, 6), src[:]...), dst[:]...)
		b = append(b, byte(info.Proto), byte(info.Proto>>8), 0)
		if info.Frag {
			b[len(b)-1] = 1
		}
	} else {
		return append(b, 0)
	}
	b = append(append(b, s.In.Name...), 0)
	return append(b, s.Out.Name...)
}

// known fills in the texts of the rules of a path that step s took.
func (r *resolver) known(rs *ruleset, s *events.Step, path *symbolize.Path, verdict int) *knownPath {
	k := &knownPath{Path: path, verdict: verdict, rules: make([]events.Rule, len(path.Visits))}
	for i := range path.Visits {
		v := &path.Visits[i]
		k.rules[i] = events.Rule{
			Chain: v.Chain, Type: events.RuleType(v.Type), Num: v.Num,
			Text: r.text(rs, v.Index), IsPolicy: v.IsPolicy, IsEnd: v.IsEnd,
			Action: v.Action, Depth: v.Depth,
		}
		k.rules[i].TracePrefix = render.TracePrefix(s, &k.rules[i])
		k.modifies = k.modifies || rs.table.Entries[v.Index].Modifies()
	}
	return k
}
