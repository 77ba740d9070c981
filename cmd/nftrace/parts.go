package main

import (
	"encoding/binary"

	"github.com/nftrace/nftrace/pkg/events"
)

// Most parts of hooks' calls are like parts before them: of the same pattern, for packets
// came to the same place, and the same rules of the same tables counted them. What was
// resolved of a part is kept with its pattern, and holds for each part of that pattern that
// is the same in all else that was looked at: see partKey. What depends on more of the packet,
// such as what targets made of it, is not kept.
//
// Only what is final is kept, which is what is known of parts that are resolved. What could
// not be told is tried again with each part.

// knownPart is what is known of a part.
type knownPart struct {
	key      partKey
	runs     []tableRun // without their steps
	modifies bool       // a rule may have changed the packet
}

// partKey is what was looked at to resolve a part, besides its pattern.
type partKey struct {
	partVerdict
	// Of the packet, if rules were held against it (all there is of ARP in addrs):
	proto, later uint8
	addrs        [4]uint64
}

// partVerdict is what is looked at for all parts.
type partVerdict struct {
	verdict int8
	family  uint8 // of the packet's addresses (or events.PFARP); 0: they are not known
}

// knownParts are the parts that are kept with a pattern.
type knownParts struct {
	any *knownPart // no rule was held against the packet
	// Others each have a place, by the packet's addresses, which another may take from it.
	by [8]*knownPart
}

// place is where among knownParts.by a part is kept.
func (k *partKey) place() uint64 {
	a := &k.addrs
	return (a[0] ^ a[1] ^ a[2] ^ a[3]) * 0x9e3779b97f4a7c15 >> 61
}

// verdictOfPart makes the first half of a part's key.
func verdictOfPart(part *events.Part) partVerdict {
	v := partVerdict{verdict: int8(part.Verdict)}
	switch p := &part.Before; {
	case p.Family == events.PFIPv4 && len(p.Data) >= 20, p.Family == events.PFIPv6 && len(p.Data) >= 40:
		v.family = p.Family
	case arpOf(p) != nil:
		v.family = events.PFARP
	}
	return v
}

// keyOf makes a part's whole key.
func keyOf(part *events.Part, v partVerdict) partKey {
	k := partKey{partVerdict: v}
	switch p := &part.Before; v.family {
	case events.PFIPv4:
		// packetInfo, without taking the header apart.
		k.proto, k.later = p.Data[9], min(p.Data[6]&0x1f|p.Data[7], 1)
		k.addrs[0] = binary.NativeEndian.Uint64(p.Data[12:])
	case events.PFARP:
		var b [len(k.addrs) * 8]byte
		copy(b[:], arpOf(&part.Before))
		for i := range k.addrs {
			k.addrs[i] = binary.NativeEndian.Uint64(b[8*i:])
		}
	case events.PFIPv6:
		t, later := p.Tuple()
		k.proto = t.Proto
		if later {
			k.later = 1
		}
		for i := range k.addrs {
			k.addrs[i] = binary.NativeEndian.Uint64(p.Data[8+8*i:])
		}
	}
	return k
}

// find returns what is known of a part, nil if nothing is.
func (all *knownParts) find(part *events.Part) *knownPart {
	v := verdictOfPart(part)
	if k := all.any; k != nil && k.key.partVerdict == v {
		return k
	}
	key := keyOf(part, v)
	if k := all.by[key.place()]; k != nil && k.key == key {
		return k
	}
	return nil
}

// keep keeps what became known of a part, if that is all there is to know.
func (all *knownParts) keep(part *events.Part, runs []tableRun) {
	k := &knownPart{}
	looked := false
	for _, run := range runs {
		if run.path == nil {
			return
		}
		k.runs = append(k.runs, tableRun{table: run.table, path: run.path})
		k.modifies = k.modifies || run.path.modifies
		looked = looked || run.path.looked
	}
	v := verdictOfPart(part)
	if !looked {
		k.key.partVerdict = v
		all.any = k
		return
	}
	k.key = keyOf(part, v)
	all.by[k.key.place()] = k
}

// again fills in the steps of a part that is like it.
func (k *knownPart) again(runs []tableRun, steps []events.Step) []tableRun {
	for i := range steps {
		run := k.runs[i]
		run.step = &steps[i]
		run.path.taken(run.step)
		runs = append(runs, run)
	}
	return runs
}

// unmodified does so, and what packetsOf does, for a packet that is known and that no rule
// changes.
func (k *knownPart) unmodified(part *events.Part, steps []events.Step) {
	now := &part.Before
	for i := range steps {
		s := &steps[i]
		t := s.Table
		k.runs[i].path.taken(s)
		t.SetBefore(now, t.Before.CT, t.Before.CTReply)
		now = t.Before
		if len(t.Rules) > 0 {
			t.Met = append(t.Met, events.Met{Pkt: now})
		}
		if s.Verdict == events.NFAccept {
			t.After = now
		}
	}
}
