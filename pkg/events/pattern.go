package events

import (
	"bytes"
	"fmt"
	"slices"
	"unsafe"

	"github.com/nftrace/nftrace/bpf"
)

// Pattern is what the record of a part says apart from its packet: where it was, which
// tables there are and which of their rules' counters grew. Most packets do what others did
// before them, so the records of one pattern differ in the packet, in numbers of the journey
// and in times only, and what follows from a pattern need not be worked out again.
//
// What a pattern says never changes. A table that is replaced has another generation and a
// device that is renamed another name, which makes another pattern.
type Pattern struct {
	// Known is for who resolves parts: what it worked out of the pattern, to find it at
	// the next part that has it.
	Known any

	// What the record says, but for the packet, and for the bytes of hits, which are the
	// packet's length for each time that a rule matched.
	netns  uint32
	flags  uint32
	at     []byte // struct place and ntables
	tables []byte // nhits, runs, and the tables; empty if there are none
	hits   []hitWord
	size   int // the packet's length, in the bytes of listed
	// renamed is Assembler.renamed when the names of devices were looked up.
	renamed int

	// What was made of it.
	place      Place
	listed     []listed // in the order in which the kernel runs them
	ran        []int    // those of listed that certainly ran, or may have
	unresolved string   // why nothing can be told of any table, but for nat
	nat        bool     // rules of nat are among the hits
	runs       int      // of tables, as the kernel counted them; -1: it could not
	unseen     bool     // what became of the packet is known only if REC_AFTER comes
	told       bool     // OnRun was told of its runs
}

// listed is a table that a hook can run through.
type listed struct {
	name string
	id   TableID
	rank uint8 // in the order in which the kernel runs them
	hits []Hit // of its rules, as Hits of a TableRun
}

// hitWord is what stands in struct hit before its bytes.
type hitWord uint64

func word(h *bpf.NftraceHit) hitWord { return *(*hitWord)(unsafe.Pointer(h)) }

const (
	// patternBits is how many pairs of patterns are kept, as a power of 2. Each pattern has a
	// pair, of which two others may take its place.
	patternBits = 9
	// maxPatternHits bounds how large those are.
	maxPatternHits = 64
)

// Offsets in rec_hook.
const (
	hookPlace  = unsafe.Offsetof(bpf.NftraceRecHook{}.Place)
	hookBefore = unsafe.Offsetof(bpf.NftraceRecHook{}.Before)
	hookNhits  = unsafe.Offsetof(bpf.NftraceRecHook{}.Nhits)
	hookTables = unsafe.Offsetof(bpf.NftraceRecHook{}.Tables)
	hookHits   = unsafe.Offsetof(bpf.NftraceRecHook{}.Hits)

	ebtHits = unsafe.Offsetof(bpf.NftraceRecEbt{}.Hits)

	tableSize = unsafe.Sizeof(bpf.NftraceHookTable{})
	hitSize   = unsafe.Sizeof(bpf.NftraceHit{})
)

// patternFlags are the flags of a record that belong to its pattern.
const patternFlags = ^uint32(bpf.NftraceRecFlagREC_F_TENTATIVE | bpf.NftraceRecFlagREC_F_LATE)

// patternAt is the pair in which the pattern of a record is kept, the newer one first. The
// record has at least a place.
func (a *Assembler) patternAt(r *bpf.NftraceRecHook, hits []bpf.NftraceHit) *[2]*Pattern {
	const prime = 0x9e3779b97f4a7c15
	p := &r.Place
	h := uint64(r.Hdr.Netns)<<32 | uint64(p.In.Ifindex)
	h = h*prime ^ (uint64(p.Out.Ifindex)<<32 | uint64(p.Physin))
	h = h*prime ^ (uint64(r.Ntables)<<16 | uint64(p.Pf)<<8 | uint64(p.Hook))
	for i := range hits {
		h = h*prime ^ uint64(word(&hits[i]))
	}
	return &a.patterns[h*prime>>(64-patternBits)]
}

// fits tells whether a record that is whole has the pattern. Its hits' bytes must be
// those of the packet alone.
func (p *Pattern) fits(r *bpf.NftraceRecHook, raw []byte, hits []bpf.NftraceHit) bool {
	if p.netns != r.Hdr.Netns || p.flags != r.Hdr.Flags&patternFlags || len(p.hits) != len(hits) ||
		!bytes.Equal(p.at, raw[hookPlace:hookBefore]) {
		return false
	}
	if r.Ntables == 0 {
		return true
	}
	if !bytes.Equal(p.tables, raw[hookNhits:hookTables+uintptr(r.Ntables)*tableSize]) {
		return false
	}
	size := uint64(r.Before.Len)
	for i, w := range p.hits {
		if h := &hits[i]; w != word(h) || h.Bytes != uint64(h.Packets)*size {
			return false
		}
	}
	return true
}

// pattern returns the pattern of a record that is whole. kept tells whether it is among
// those that are found again, and the bytes of the hits are those of the packet alone.
func (a *Assembler) pattern(r *bpf.NftraceRecHook, raw []byte, hits []bpf.NftraceHit) (p *Pattern, kept bool, err error) {
	at := a.patternAt(r, hits)
	for _, p := range at {
		if p != nil && p.renamed == a.renamed && p.fits(r, raw, hits) {
			return p, true, nil
		}
	}
	for i := range hits {
		if n := hits[i].Table; uint32(n) >= r.Ntables {
			return nil, false, fmt.Errorf("record names %d tables, but a rule of the %dth", r.Ntables, n+1)
		}
	}
	p = a.newPattern(r, raw, hits)
	if len(hits) > maxPatternHits || !p.fits(r, raw, hits) {
		return p, false, nil
	}
	at[0], at[1] = p, at[0]
	return p, true, nil
}

func (a *Assembler) newPattern(r *bpf.NftraceRecHook, raw []byte, hits []bpf.NftraceHit) *Pattern {
	p := &Pattern{
		netns: r.Hdr.Netns, flags: r.Hdr.Flags & patternFlags,
		at: bytes.Clone(raw[hookPlace:hookBefore]), hits: make([]hitWord, len(hits)), runs: -1,
	}
	for i := range hits {
		p.hits[i] = word(&hits[i])
	}
	where := &r.Place
	p.place = Place{
		Netns: p.netns, PF: where.Pf, Hook: where.Hook,
		In: a.device(p.netns, &where.In), Out: a.device(p.netns, &where.Out),
		PhysIn: Device{Index: int(where.Physin)}, PhysOut: a.device(p.netns, &where.Physout),
		Reinjected: p.flags&uint32(bpf.NftraceRecFlagREC_F_REINJECTED) != 0,
	}
	p.renamed = a.renamed
	if r.Ntables > 0 {
		p.size = int(r.Before.Len)
		p.tables = bytes.Clone(raw[hookNhits : hookTables+uintptr(r.Ntables)*tableSize])
		a.list(p, r, hits)
	}
	return p
}

// list fills in what a record says of tables.
func (a *Assembler) list(p *Pattern, r *bpf.NftraceRecHook, hits []bpf.NftraceHit) {
	early := rewritesDst(p.place.Hook)
	for i := range r.Tables[:r.Ntables] {
		t := &r.Tables[i]
		name := string(cBytes(t.Name[:]))
		p.listed = append(p.listed, listed{
			name: name, id: TableID{Private: t.Private, Gen: t.Gen}, rank: rank(name, early), hits: hitsOf(hits, i),
		})
	}
	slices.SortStableFunc(p.listed, func(x, y listed) int { return int(x.rank) - int(y.rank) })
	p.unresolved = unresolved(p.flags)
	p.unseen = p.flags&uint32(bpf.NftraceRecFlagREC_F_UNSEEN) != 0
	for i := range p.listed {
		p.nat = p.nat || p.unresolved == "" && p.listed[i].name == "nat" && len(p.listed[i].hits) > 0
		if l := &p.listed[i]; len(l.hits) > 0 || p.unresolved != "" && l.name != "nat" {
			p.ran = append(p.ran, i)
		}
	}
	if p.unresolved == "" && p.flags&uint32(bpf.NftraceRecFlagREC_F_UNCOUNTED) == 0 {
		p.runs = int(r.Runs)
	}
}
