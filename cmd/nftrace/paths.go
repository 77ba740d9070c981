package main

import (
	"encoding/binary"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/render"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// maxPaths bounds what is kept for one ruleset.
const maxPaths = 4096

// knownPath is what walk made of a run, with the texts of the rules.
type knownPath struct {
	*symbolize.Path
	rules    []events.Rule // without the packets
	modifies bool          // one of them may have changed the packet
}

// pathCache keeps the paths through one ruleset: packets of one flow take the same
// way. The key is all that walk looks at.
type pathCache map[string]*knownPath

func (c pathCache) get(key []byte) *knownPath { return c[string(key)] }

func (c *pathCache) put(key []byte, p *knownPath) {
	if *c == nil || len(*c) >= maxPaths {
		*c = pathCache{}
	}
	(*c)[string(key)] = p
}

// pathKey appends what tells the path of a run: where it was, what it did, and what the
// rules' own conditions look at. The byte counters are not part of it: see bytesFit.
func pathKey(b []byte, s *events.Step) []byte {
	b = append(b, s.Hook)
	b = binary.NativeEndian.AppendUint64(b, uint64(s.Verdict))
	b = binary.NativeEndian.AppendUint64(b, uint64(len(s.Table.Hits)))
	for i := range s.Table.Hits {
		h := &s.Table.Hits[i]
		b = binary.NativeEndian.AppendUint64(b, uint64(h.Index))
		b = binary.NativeEndian.AppendUint64(b, h.Packets)
	}
	info, ok := packetInfo(s)
	if !ok {
		return append(b, 0)
	}
	src, dst := info.Src.As16(), info.Dst.As16()
	b = append(append(append(b, 1), src[:]...), dst[:]...)
	if info.Frag {
		b = append(b, 1)
	} else {
		b = append(b, 0)
	}
	b = binary.NativeEndian.AppendUint64(b, uint64(info.Proto))
	b = append(append(b, info.In...), 0)
	return append(b, info.Out...)
}

// known fills in the texts of the rules of a path that step s took.
func (r *resolver) known(rs *ruleset, s *events.Step, path *symbolize.Path) *knownPath {
	k := &knownPath{Path: path, rules: make([]events.Rule, len(path.Visits))}
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
