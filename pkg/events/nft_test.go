package events

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/nftrace/nftrace/bpf"
)

// did is a REC_NFT of table 7 of family inet, but for what it says otherwise.
type did struct {
	what        NFTWhat
	table, base uint64 // 0: 7, 1
	rule, chain uint64
	code        int
	ct          int // 1 + enum ip_conntrack_info; 0: none
	flipped     bool
}

func (s *script) nft(all ...did) {
	s.t.Helper()
	for _, d := range all {
		r := bpf.NftraceRecNft{Hdr: s.hdr(bpf.NftraceRecTypeREC_NFT, 0), Table: 7, Base: 1, Rule: d.rule, Chain: d.chain,
			Gen: 13, Code: int32(d.code), What: uint8(d.what), Family: PFInet}
		if d.table != 0 {
			r.Table = d.table
		}
		if d.base != 0 {
			r.Base = d.base
		}
		if d.ct != 0 {
			r.Flags, r.Ctinfo = uint8(bpf.NftracePktFlagPKT_F_CT), uint8(d.ct-1)
		}
		if d.flipped {
			r.Flipped = 1
		}
		copy(bytesOf(&r.Name, unsafe.Sizeof(r.Name)), "fw")
		s.add(bytesOf(&r, unsafe.Sizeof(r)))
	}
}

// saw is a REC_SEEN of a ping with that mark.
func (s *script) saw(mark uint32, flags bpf.NftraceRecFlag) {
	p := ping()
	p.Mark = mark
	s.sawPacket(p, flags)
}

func (s *script) sawPacket(p bpf.NftracePkt, flags bpf.NftraceRecFlag) {
	r := bpf.NftraceRecPkt{Hdr: s.hdr(bpf.NftraceRecTypeREC_SEEN, flags), Pkt: p}
	s.add(bytesOf(&r, unsafe.Sizeof(r)))
}

// flow is a REC_FLOW.
func (s *script) flow() {
	r := bpf.NftraceRecFlow{Hdr: s.hdr(bpf.NftraceRecTypeREC_FLOW, 0), Family: PFInet}
	copy(bytesOf(&r.Table, unsafe.Sizeof(r.Table)), "fw")
	copy(bytesOf(&r.Name, unsafe.Sizeof(r.Name)), "fast")
	s.add(bytesOf(&r, unsafe.Sizeof(r)))
}

const between = bpf.NftraceRecFlagREC_F_BETWEEN

func nftRule(n uint64, code int) did { return did{what: NFTRule, rule: n, code: code} }

func inChain(base uint64, d did) did { d.base = base; return d }

var (
	nftEnd    = did{what: NFTEnd, chain: 1, code: NFTContinue}
	nftAccept = did{what: NFTPolicy, code: NFAccept}
	nftDrop   = did{what: NFTPolicy, code: NFDrop}
)

// nftShape is a journey's steps: runs of nf_tables as "BASE=VERDICT EVENT …", each event with
// the mark of its packet, "?" behind it where that is unsure, and behind "/" what it was behind
// the last one, where it was another.
func nftShape(j *Journey) string {
	verdict := func(v int) string {
		names := map[int]string{NFDrop: "drop", NFAccept: "accept", NFStolen: "stolen", NFQueue: "queue", VerdictUnknown: "?"}
		if n, ok := names[v]; ok {
			return n
		}
		return fmt.Sprint(v)
	}
	var words []string
	for i := range j.Steps {
		s := &j.Steps[i]
		switch {
		case s.Kind == StepTable && s.Table.NFT != nil:
			n := s.Table.NFT
			w := fmt.Sprintf("%d.%d=%s", n.Table, n.Base, verdict(s.Verdict))
			for _, e := range n.Events {
				switch e.What {
				case NFTRule:
					w += fmt.Sprintf(" r%d", e.Rule)
				case NFTEnd:
					w += " end"
				case NFTPolicy:
					w += " policy"
				}
				w += fmt.Sprintf("@%d", e.Packet.Mark)
				if e.Unsure {
					w += "?"
				}
			}
			if n.Behind != nil {
				w += fmt.Sprintf("/%d", n.Behind.Mark)
			}
			switch s.Table.Unresolved {
			case "":
			case nftMissed:
				w += " missed"
			case nftGap:
				w += " gap"
			case nftGone:
				w += " gone"
			default:
				w += " unresolved"
			}
			words = append(words, w)
		case s.Kind == StepTable:
			w := s.Table.Name + "=" + verdict(s.Verdict)
			if s.Table.Unresolved != "" {
				w += " unresolved"
			}
			words = append(words, w)
		case s.Kind == StepHook:
			words = append(words, HookName(s.PF, s.Hook)+"="+verdict(s.Verdict))
		case s.Kind == StepNAT:
			words = append(words, "nat")
		case s.Kind == StepXmit:
			words = append(words, "xmit")
		case s.Kind == StepFlowtable:
			w := fmt.Sprintf("flowtable %d:%s:%s", s.Flowtable.Family, s.Flowtable.Table, s.Flowtable.Name)
			if s.NAT != nil {
				w += fmt.Sprintf(" %v->%v", s.NAT.Before.Dst, s.NAT.After.Dst)
			}
			words = append(words, w)
		}
	}
	return strings.Join(words, ", ")
}

// What nf_tables told comes before the record of the hook, and is divided into runs of base
// chains.
func TestNFTRuns(t *testing.T) {
	const torn, missed = bpf.NftraceRecFlagREC_F_TORN, bpf.NftraceRecFlagREC_F_NFTMISSED
	hook := func(s *script) { s.first(HookForward, 0) }
	filter := part{hook: HookForward, tables: []string{"filter"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 4, 1)}}
	for _, tt := range []struct {
		name string
		run  func(s *script)
		next string // what comes then: xmit, drop or end
		want string
	}{
		{"a rule's verdict", func(s *script) { s.nft(nftRule(5, NFAccept)); hook(s) }, "xmit", "7.1=accept r5@0, FORWARD=accept, xmit"},
		{"the policy", func(s *script) { s.nft(nftRule(5, NFTContinue), nftEnd, nftAccept); hook(s) }, "xmit",
			"7.1=accept r5@0 end@0 policy@0, FORWARD=accept, xmit"},
		{"the policy drops", func(s *script) { s.nft(nftEnd, nftDrop); hook(s) }, "drop", "7.1=drop end@0 policy@0, FORWARD=drop"},
		{"jump and return", func(s *script) {
			s.nft(nftRule(5, NFTJump), nftRule(6, NFTReturn), nftRule(7, NFTGoto), did{what: NFTEnd, chain: 3, code: NFTContinue}, nftAccept)
			hook(s)
		}, "xmit", "7.1=accept r5@0 r6@0 r7@0 end@0 policy@0, FORWARD=accept, xmit"},
		{"several base chains", func(s *script) {
			s.nft(nftRule(5, NFAccept), inChain(2, nftEnd), inChain(2, nftAccept), inChain(3, nftRule(6, NFDrop)))
			hook(s)
		}, "drop", "7.1=accept r5@0, 7.2=accept end@0 policy@0, 7.3=drop r6@0, FORWARD=drop"},
		{"chains of two tables with one handle", func(s *script) {
			s.nft(nftRule(5, NFTContinue), did{what: NFTPolicy, table: 8, code: NFAccept})
			hook(s)
		}, "xmit", "7.1=stolen r5@0 gone, 8.1=accept policy@0, FORWARD=accept, xmit"},
		{"a base chain twice", func(s *script) { s.nft(nftRule(5, NFAccept), nftRule(5, NFAccept)); hook(s) }, "xmit",
			"7.1=accept r5@0, 7.1=accept r5@0, FORWARD=accept, xmit"},
		{"twice, by its policy", func(s *script) { s.nft(nftEnd, nftAccept, nftEnd, nftAccept); hook(s) }, "xmit",
			"7.1=accept end@0 policy@0, 7.1=accept end@0 policy@0, FORWARD=accept, xmit"},
		{"queued", func(s *script) { s.nft(nftRule(5, 11<<16|NFQueue)); hook(s) }, "end", "7.1=queue r5@0, FORWARD=?"},
		{"queued to a number of 16 bits", func(s *script) { s.nft(nftRule(5, 0xffff<<16|NFQueue)); hook(s) }, "end", "7.1=queue r5@0, FORWARD=?"},
		{"stolen by a rule that told", func(s *script) { s.nft(nftRule(5, NFStolen)); hook(s) }, "end", "7.1=stolen r5@0, FORWARD=?"},
		{"gone before its rule told", func(s *script) { s.nft(nftRule(5, NFTJump), nftRule(6, NFTContinue)); hook(s) }, "end",
			"7.1=stolen r5@0 r6@0 gone, FORWARD=?"},

		{"gone before its rule told, and then another chain", func(s *script) {
			s.nft(nftRule(5, NFTContinue), inChain(2, nftRule(6, NFAccept)))
			hook(s)
		}, "xmit", "7.1=stolen r5@0 gone, 7.2=accept r6@0, FORWARD=accept, xmit"},

		{"seen behind a rule", func(s *script) {
			s.nft(nftRule(5, NFTContinue))
			s.saw(3, 0)
			s.nft(nftRule(6, NFTContinue), nftEnd, nftAccept)
			hook(s)
		}, "xmit", "7.1=accept r5@0 r6@0 end@3 policy@3, FORWARD=accept, xmit"},
		{"seen behind the last rule", func(s *script) { s.nft(nftRule(5, NFTContinue)); s.saw(3, 0); s.nft(nftRule(6, NFAccept)); hook(s) },
			"xmit", "7.1=accept r5@0 r6@0/3, FORWARD=accept, xmit"},
		{"seen behind two rules", func(s *script) {
			s.saw(3, 0)
			s.nft(nftRule(5, NFTContinue))
			s.saw(5, 0)
			s.nft(nftRule(6, NFTContinue), nftEnd, nftAccept)
			hook(s)
		}, "xmit", "7.1=accept r5@0 r6@3 end@5 policy@5, FORWARD=accept, xmit"},
		{"seen between two chains", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			s.saw(3, between)
			s.nft(inChain(2, nftRule(6, NFTContinue)), inChain(2, nftEnd), inChain(2, nftAccept))
			hook(s)
		}, "xmit", "7.1=accept r5@0, 7.2=accept r6@3 end@3 policy@3, FORWARD=accept, xmit"},
		{"changed by the first rule of all", func(s *script) { s.saw(3, 0); s.nft(nftRule(5, NFAccept)); hook(s) }, "xmit",
			"7.1=accept r5@0/3, FORWARD=accept, xmit"},
		{"changed by the first rule, or by a legacy table", func(s *script) { s.saw(3, 0); s.nft(nftRule(5, NFAccept)); s.part(filter) }, "xmit",
			"7.1=accept r5@0?/3, filter=accept, FORWARD=accept, xmit"},
		{"changed by a later rule, with a legacy table", func(s *script) {
			s.nft(nftRule(5, NFTContinue))
			s.saw(3, 0)
			s.nft(nftRule(6, NFAccept))
			s.part(filter)
		}, "xmit", "7.1=accept r5@0 r6@0/3, filter=accept, FORWARD=accept, xmit"},
		{"changed by the first rule of the second chain, or between", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			s.saw(3, 0)
			s.nft(inChain(2, nftRule(6, NFAccept)))
			hook(s)
		}, "xmit", "7.1=accept r5@0, 7.2=accept r6@0?/3, FORWARD=accept, xmit"},
		{"of another length", func(s *script) {
			p := ping()
			p.Len, p.Mark = 88, 3
			s.sawPacket(p, 0)
			s.nft(nftRule(5, NFAccept))
			hook(s)
		}, "xmit", "7.1=accept r5@0?/3, FORWARD=accept, xmit"},

		{"the probe was skipped", func(s *script) { s.nft(nftRule(5, NFAccept)); s.first(HookForward, missed) }, "xmit",
			"7.1=accept r5@0 missed, FORWARD=accept, xmit"},
		{"skipped, and gone", func(s *script) { s.nft(nftRule(5, NFTContinue)); s.first(HookForward, missed) }, "end",
			"7.1=? r5@0 missed, FORWARD=?"},
		{"legacy tables that are torn", func(s *script) {
			p := filter
			p.flags, p.runs = torn, 3
			s.nft(nftRule(5, NFAccept))
			s.part(p)
		}, "xmit", "7.1=accept r5@0, filter=accept unresolved, FORWARD=accept, xmit"},

		{"dropped beside a legacy table", func(s *script) { s.nft(nftRule(5, NFDrop)); s.part(filter) }, "drop",
			"7.1=drop r5@0, filter=accept, FORWARD=drop"},
		{"queued beside a legacy table", func(s *script) { s.nft(nftRule(5, NFQueue)); s.part(filter) }, "end",
			"7.1=queue r5@0, filter=accept, FORWARD=?"},
		{"dropped by a legacy table", func(s *script) { s.nft(nftEnd, nftAccept); s.part(filter) }, "drop",
			"7.1=accept end@0 policy@0, filter=?, FORWARD=drop"},
		{"dropped by nf_tables, of which the end is missed, or by a legacy table", func(s *script) {
			p := filter
			p.flags = missed
			s.nft(nftRule(5, NFTContinue))
			s.part(p)
		}, "drop", "7.1=? r5@0 missed, filter=?, FORWARD=drop"},
		{"missed, and it went on", func(s *script) {
			p := filter
			p.flags = missed
			s.nft(nftRule(5, NFTContinue))
			s.part(p)
		}, "xmit", "7.1=? r5@0 missed, filter=accept, FORWARD=accept, xmit"},
		{"dropped by a match of a legacy table", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			s.part(part{hook: HookForward, tables: []string{"filter"}, runs: 1})
		}, "drop", "7.1=accept r5@0, filter=drop, FORWARD=drop"},
		{"dropped, and a legacy table counted nothing", func(s *script) {
			s.nft(nftRule(5, NFDrop))
			s.part(part{hook: HookForward, tables: []string{"filter"}})
		}, "drop", "7.1=drop r5@0, FORWARD=drop"},

		{"split by NAT", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			hook(s)
			s.nat(1)
			p := dnatted()
			s.sawPacket(p, 0)
			s.nft(inChain(2, nftRule(6, NFTContinue)), inChain(2, nftEnd), inChain(2, nftAccept))
			s.part(part{hook: HookForward, before: &p})
		}, "xmit", "7.1=accept r5@0, nat, 7.2=accept r6@0? end@0 policy@0, FORWARD=accept, xmit"},
		{"dropped behind NAT, and not seen there", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			hook(s)
			s.nat(1)
			s.nft(inChain(2, nftRule(6, NFDrop)))
			s.part(part{hook: HookForward, before: &bpf.NftracePkt{}})
		}, "drop", "7.1=accept r5@0, 7.2=drop r6@0?, FORWARD=drop"},

		{"a flowtable", func(s *script) { s.flow(); hook(s) }, "xmit", "flowtable 1:fw:fast, FORWARD=accept, xmit"},
		{"a flowtable behind rules", func(s *script) { s.nft(nftRule(5, NFAccept)); s.flow(); hook(s) }, "xmit",
			"7.1=accept r5@0, flowtable 1:fw:fast, FORWARD=accept, xmit"},
		{"a flowtable that rewrites", func(s *script) { s.flow(); hook(s); s.after(dnatted()) }, "xmit",
			"flowtable 1:fw:fast 10.0.0.2:5->10.0.0.9:5, FORWARD=accept, xmit"},
		{"a flowtable that changes what is no address", func(s *script) {
			p := ping()
			p.Mark = 3
			s.flow()
			hook(s)
			s.after(p)
		}, "xmit", "flowtable 1:fw:fast, FORWARD=accept, xmit"},
		{"a flowtable that puts it behind another header", func(s *script) {
			p := ping()
			p.Ethertype = 0x8864 // ETH_P_PPP_SES
			s.flow()
			hook(s)
			s.after(p)
		}, "xmit", "flowtable 1:fw:fast, FORWARD=accept, xmit"},
		{"a flowtable that puts it into a tunnel", func(s *script) {
			p := dnatted()
			p.Data[9] = 4 // IPPROTO_IPIP
			s.flow()
			hook(s)
			s.after(p)
		}, "xmit", "flowtable 1:fw:fast, FORWARD=accept, xmit"},
		{"a flowtable of a hook whose record is lost", func(s *script) {
			s.flow()
			s.seq++
			hook(s)
		}, "xmit", "FORWARD=accept, xmit"},

		{"a record is lost among them", func(s *script) { s.nft(nftRule(5, NFTJump)); s.seq++; s.nft(nftRule(6, NFAccept)); hook(s) }, "xmit",
			"7.1=accept r6@0 gap, FORWARD=accept, xmit"},
		{"a record is lost before them", func(s *script) { hook(s); s.seq++; s.nft(nftRule(6, NFAccept)); s.filter(HookPostRouting) }, "xmit",
			"FORWARD=accept, 7.1=accept r6@0 gap, filter=accept, POSTROUTING=accept, xmit"},
		{"lost, and what came last did not end a chain", func(s *script) { s.nft(nftRule(5, NFTJump)); s.seq++; s.nft(nftRule(6, NFTContinue)); hook(s) },
			"end", "7.1=? r6@0 gap, FORWARD=?"},
		{"what was seen is lost with it", func(s *script) {
			s.saw(3, 0)
			s.seq++
			s.nft(nftRule(6, NFTContinue), nftEnd, nftAccept)
			hook(s)
		}, "xmit", "7.1=accept r6@0 end@0 policy@0 gap, FORWARD=accept, xmit"},
		{"their hook is lost", func(s *script) { s.nft(nftRule(5, NFAccept)); s.seq++; s.filter(HookPostRouting) }, "xmit",
			"filter=accept, POSTROUTING=accept, xmit"},
		{"their hook is lost, and the next one is whole", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			s.seq++
			hook(s)
			s.nft(inChain(2, nftRule(6, NFAccept)))
			s.filter(HookPostRouting)
		}, "xmit", "FORWARD=accept, 7.2=accept r6@0, filter=accept, POSTROUTING=accept, xmit"},
		{"their hook is lost, and they are no device's", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			s.seq++
			s.xmit()
			s.nft(inChain(2, nftRule(6, NFAccept)))
			s.filter(HookPostRouting)
		}, "xmit", "xmit, 7.2=accept r6@0, filter=accept, POSTROUTING=accept, xmit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, NewAssembler(), 7)
			tt.run(s)
			switch tt.next {
			case "xmit":
				s.xmit()
				s.end(0)
			case "drop":
				s.drop()
			default:
				s.end(0)
			}
			j := s.journey()
			if got := nftShape(j); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if lost := strings.Contains(tt.name, "lost"); j.HalfSeen != "" || (j.Lost > 0) != lost {
				t.Errorf("half seen %q, lost %d", j.HalfSeen, j.Lost)
			}
		})
	}
}

// Behind NAT a run's packet is as it was behind its first rule, but for the mark, and not as at the
// part's end, when it may have been routed.
func TestNFTBeforeBehindNAT(t *testing.T) {
	marked, routed := dnatted(), dnatted()
	marked.Mark, routed.Mark = 3, 3
	routed.Data[8]--
	for _, known := range []bool{true, false} {
		s := newScript(t, NewAssembler(), 7)
		if known {
			s.first(HookPreRouting, 0)
		} else {
			s.first(HookPreRouting, bpf.NftraceRecFlagREC_F_NFTMISSED)
		}
		s.nat(1)
		s.sawPacket(marked, 0)
		s.nft(nftRule(5, NFTContinue), nftAccept)
		s.part(part{hook: HookPreRouting, before: &routed})
		s.xmit()
		s.end(0)
		j := s.journey()
		i := slices.IndexFunc(j.Steps, func(s Step) bool { return s.Table != nil })
		run := j.Steps[i].Table
		mark, ttl := uint32(0), byte(64)
		if !known {
			mark, ttl = 3, 63
		}
		if p := run.Before; p.Mark != mark || p.Data[8] != ttl || p.Data[19] != 9 {
			t.Errorf("known %v: %+v, want mark %d, ttl %d", known, p, mark, ttl)
		}
		if e := &run.NFT.Events[1]; e.Packet.Mark != 3 || e.Packet.Data[8] != 64 || !run.NFT.Events[0].Unsure {
			t.Errorf("known %v: events %+v", known, run.NFT.Events)
		}
	}
}

// What a run says of itself, and who is told of it.
func TestNFTRun(t *testing.T) {
	a := NewAssembler()
	var told []string
	a.OnRun = func(s *Step) { told = append(told, fmt.Sprintln(s.Table.Name, s.Table.NFT != nil, s.Hook, s.Netns)) }
	s := newScript(t, a, 7)
	s.nft(did{what: NFTRule, rule: 5, chain: 3, code: NFTJump}, did{what: NFTRule, rule: 6, code: NFTContinue, ct: 3},
		did{what: NFTRule, rule: 8, code: NFDrop, ct: 4})
	s.filter(HookLocalIn)
	if want := []string{"fw true 1 77\n", "filter false 1 77\n"}; !slices.Equal(told, want) {
		t.Errorf("OnRun was told of %q, want %q", told, want)
	}
	s.drop()
	j := s.journey()
	st := j.Steps[0]
	run := st.Table
	n := run.NFT
	if run.Name != "fw" || n.Family != PFInet || n.Table != 7 || n.Base != 1 || n.Gen != 13 || run.ID != (TableID{}) || run.Hits != nil {
		t.Errorf("run %+v of %+v", n, run)
	}
	if j.Start != time.Second+3500 || st.Netns != 77 || st.PF != PFIPv4 || st.In.Name != "eth0" {
		t.Errorf("start %v, step %+v", j.Start, st.Place)
	}
	want := []NFTEvent{
		{What: NFTRule, Rule: 5, Chain: 3, Code: NFTJump},
		{What: NFTRule, Rule: 6, Code: NFTContinue, CT: "NEW"},
		{What: NFTRule, Rule: 8, Code: NFDrop, CT: "ESTABLISHED", Reply: true},
	}
	for i, e := range n.Events {
		if e.Packet == nil || len(e.Packet.Data) != 28 {
			t.Errorf("event %d: packet %+v", i, e.Packet)
		}
		e.Packet = nil
		if e != want[i] {
			t.Errorf("event %d: %+v, want %+v", i, e, want[i])
		}
	}
	if p := run.Part; p == nil || p != j.Steps[1].Table.Part || p.Verdict != NFAccept {
		t.Errorf("part %+v: both engines' tables are in one, and its verdict is xtables'", p)
	}
	if o := j.Outcome; o.Kind != OutDropped || o.Step != 2 {
		t.Errorf("outcome %+v: the resolver finds the table", o)
	}
}

// The packet of a run is in the conntrack state that nf_tables told.
// A run has the rules that were in force when it began.
func TestNFTFlipped(t *testing.T) {
	first, later := nftRule(5, NFTContinue), nftAccept
	first.flipped, later.flipped = true, true
	for _, tt := range []struct {
		did  []did
		want []bool // of each run
	}{
		{[]did{nftRule(5, NFTContinue), nftEnd, nftAccept}, []bool{false}},
		{[]did{first, nftEnd, nftAccept}, []bool{true}},
		{[]did{nftRule(5, NFTContinue), nftEnd, later}, []bool{false}},
		{[]did{nftEnd, later, inChain(2, nftEnd), inChain(2, nftAccept)}, []bool{false, false}},
		{[]did{nftEnd, nftAccept, inChain(2, first), inChain(2, nftAccept)}, []bool{false, true}},
	} {
		s := newScript(t, NewAssembler(), 7)
		s.nft(tt.did...)
		s.first(HookPreRouting, 0)
		s.end(0)
		var got []bool
		for _, step := range s.journey().Steps {
			if step.Table != nil && step.Table.NFT != nil {
				got = append(got, step.Table.NFT.Flipped)
			}
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%+v: %v, want %v", tt.did, got, tt.want)
		}
	}
}

func TestNFTConntrack(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.nft(did{what: NFTRule, rule: 5, code: NFAccept}, inChain(2, did{what: NFTRule, rule: 6, code: NFAccept, ct: 3}))
	s.first(HookPreRouting, 0)
	s.end(0)
	j := s.journey()
	for i, want := range []string{"", "NEW"} {
		if b := j.Steps[i].Table.Before; b.CT != want || len(b.Data) != 28 {
			t.Errorf("run %d: %+v, want %q", i, b, want)
		}
	}
}

// NAT rewrites the packet as nf_tables left it.
func TestNFTBeforeNAT(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	p, behind := dnatted(), dnatted()
	behind.Data[19] = 11
	s.nft(nftRule(5, NFTContinue))
	s.sawPacket(p, 0)
	s.nft(nftRule(6, NFTContinue), nftEnd, nftAccept)
	s.first(HookPreRouting, 0)
	s.nat(1)
	s.part(part{hook: HookPreRouting, before: &behind})
	s.xmit()
	s.end(0)
	j := s.journey()
	if want := "7.1=accept r5@0 r6@0 end@0 policy@0, nat, PREROUTING=accept, xmit"; nftShape(j) != want {
		t.Fatalf("got  %s\nwant %s", nftShape(j), want)
	}
	if n := j.Steps[1].NAT; n.Before.Dst.Addr().String() != "10.0.0.9" || n.After.Dst.Addr().String() != "10.0.0.11" {
		t.Errorf("NAT %+v", n)
	}
}

// By a table of nf_tables that kept a packet or dropped it.
func TestNFTOutcome(t *testing.T) {
	for _, tt := range []struct {
		code int
		drop bool
		want Outcome
	}{
		{NFDrop, true, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{NFStolen, false, Outcome{Kind: OutStolen, Step: 0, Rule: -1}},
		{3<<16 | NFQueue, false, Outcome{Kind: OutQueued, Step: 0, Rule: -1}},
		{40009<<16 | NFQueue, false, Outcome{Kind: OutQueued, Step: 0, Rule: -1}}, // negative, in 32 bits
		{NFAccept, true, Outcome{Kind: OutDropped, Step: 1, Rule: -1}},
		{NFTContinue, false, Outcome{Kind: OutStolen, Step: 0, Rule: -1}},
	} {
		s := newScript(t, NewAssembler(), 7)
		s.nft(nftRule(5, tt.code))
		s.first(HookLocalIn, 0)
		if tt.drop {
			s.drop()
		}
		s.end(0)
		if j := s.journey(); j.Outcome != tt.want {
			t.Errorf("code %d: %+v, want %+v", tt.code, j.Outcome, tt.want)
		}
	}
}

func TestNFTHalfSeen(t *testing.T) {
	for _, tt := range []struct {
		name string
		run  func(s *script)
		want string // a part of it
	}{
		{"it begins with a rule", func(s *script) { s.nft(nftRule(5, NFAccept)); s.first(HookForward, 0) }, ""},
		{"it begins with a packet", func(s *script) { s.saw(3, 0); s.nft(nftRule(5, NFAccept)); s.first(HookForward, 0) }, ""},
		{"its beginning is lost", func(s *script) { s.seq++; s.nft(nftRule(5, NFAccept)); s.first(HookForward, 0) }, "was lost"},
		{"late", func(s *script) { s.nft(nftRule(5, NFAccept)); s.first(HookForward, bpf.NftraceRecFlagREC_F_LATE) }, "from FORWARD on"},
	} {
		s := newScript(t, NewAssembler(), 7)
		tt.run(s)
		s.end(0)
		j := s.journey()
		if tt.want == "" && j.HalfSeen != "" || !strings.Contains(j.HalfSeen, tt.want) {
			t.Errorf("%s: half seen %q, want %q", tt.name, j.HalfSeen, tt.want)
		}
	}
}

// What was handed out is used again, for a journey that knows nothing of it: neither of what
// was told nor of what was to come.
func TestNFTReuse(t *testing.T) {
	a := NewAssembler()
	s := newScript(t, a, 7)
	s.nft(nftRule(5, NFTContinue))
	s.saw(3, 0)
	s.nft(nftRule(6, NFAccept))
	s.first(HookPreRouting, 0)
	s.seq++
	s.saw(5, between) // of a hook whose record does not come
	s.nft(nftRule(7, NFTJump), nftRule(8, NFAccept))
	s.saw(7, 0)
	s.end(0)
	first := a.Idle(time.Duration(s.now) + 2*settle)[0]
	run := first.Steps[0].Table
	n := run.NFT // as who resolves it does
	n.Compat, n.Chain, n.Type, n.Priority = true, "INPUT", "nat", 13
	run.Rules, run.Met, run.After = []Rule{{}}, append(run.Met, Met{}), run.Before

	next := newScript(t, a, 8)
	next.now = s.now + uint64(3*settle)
	next.nft(inChain(2, nftRule(9, NFTContinue)), inChain(2, nftEnd), inChain(2, nftAccept))
	next.part(part{hook: HookForward, tables: []string{"filter"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 4, 1)}})
	next.end(0)
	j := a.Idle(time.Duration(next.now) + 2*settle)[0]
	if want := "7.2=accept r9@0 end@0 policy@0, filter=?, FORWARD=?"; j != first || nftShape(j) != want {
		t.Fatalf("got  %s\nwant %s", nftShape(j), want)
	}
	got := j.Steps[0].Table
	if got != run || got.NFT.Compat || got.NFT.Chain != "" || got.NFT.Type != "" || got.NFT.Priority != 0 || got.NFT.Behind != nil {
		t.Errorf("the run has something of the one before: %+v", got.NFT)
	}
	if len(got.Rules) != 0 || len(got.Met) != 0 || got.After != nil {
		t.Errorf("the run has something of the one before: %+v", got)
	}

	// A run of xtables knows nothing of one of nf_tables.
	last := newScript(t, a, 9)
	last.now = next.now + uint64(3*settle)
	last.filter(HookForward)
	last.end(0)
	if j = a.Idle(time.Duration(last.now) + 2*settle)[0]; j.Steps[0].Table != run || run.NFT != nil || run.Name != "filter" {
		t.Errorf("the run has something of nf_tables': %+v", j.Steps[0].Table)
	}
}

func TestNFTBadRecords(t *testing.T) {
	for typ, size := range map[bpf.NftraceRecType]uintptr{ // the shortest
		bpf.NftraceRecTypeREC_NFT:  unsafe.Offsetof(bpf.NftraceRecNft{}.Name),
		bpf.NftraceRecTypeREC_SEEN: unsafe.Sizeof(bpf.NftraceRecPkt{}),
		bpf.NftraceRecTypeREC_FLOW: unsafe.Sizeof(bpf.NftraceRecFlow{}),
	} {
		var r bpf.NftraceRecNft
		r.Hdr.Type = uint16(typ)
		raw := make([]byte, 4096)
		copy(raw, bytesOf(&r, unsafe.Sizeof(r)))
		a := NewAssembler()
		if _, err := a.Add(raw[:size-1]); err == nil || a.Stats().Bad != 1 {
			t.Errorf("type %d: was taken: %v", typ, err)
		}
	}
}

// nftScripts are journeys for FuzzAdd to begin with.
var nftScripts = []func(s *script){
	func(s *script) {
		s.flow()
		s.first(HookForward, 0)
		s.after(dnatted())
		s.end(0)
	},
	func(s *script) {
		s.nft(nftRule(5, NFTJump))
		s.saw(3, 0)
		s.nft(nftRule(6, NFTReturn), nftEnd, nftAccept)
		s.first(HookForward, 0)
		s.header(bpf.NftraceRecTypeREC_DROP, 0)
	},
	func(s *script) {
		s.nft(nftRule(5, NFAccept))
		s.saw(3, between)
		s.nft(inChain(2, nftRule(6, NFTContinue)))
		s.first(HookForward, 0)
		s.nat(1)
		s.nft(nftRule(5, NFAccept), nftRule(5, 11<<16|NFQueue))
		s.first(HookForward, 0)
		s.end(0)
	},
}

// checkNFT checks what holds of every run of a base chain, and returns how many events it has.
func checkNFT(t *testing.T, s *Step) int {
	t.Helper()
	run, n := s.Table, s.Table.NFT
	ends := func(e *NFTEvent) bool { return e.What == NFTPolicy || e.What == NFTRule && e.Code >= 0 }
	if len(n.Events) == 0 || run.Part == nil || run.Before == nil {
		t.Fatalf("run %+v", run)
	}
	last := &n.Events[len(n.Events)-1]
	for i := range n.Events {
		e := &n.Events[i]
		if e.Packet == nil || e != last && ends(e) {
			t.Fatalf("event %d of %d: %+v", i, len(n.Events), e)
		}
	}
	switch {
	case ends(last):
		if s.Verdict != last.Code&0xff {
			t.Fatalf("verdict %d of %+v", s.Verdict, last)
		}
	case run.Unresolved == "" || s.Verdict != VerdictUnknown && s.Verdict != NFStolen:
		t.Fatalf("verdict %d, %q, of %+v", s.Verdict, run.Unresolved, last)
	}
	return len(n.Events)
}

// Whether nf_tables changed the packet in a part, and what it was behind the part.
func TestNFTChanged(t *testing.T) {
	filter := part{hook: HookForward, tables: []string{"filter"}, runs: 1, hits: []bpf.NftraceHit{hit(0, 4, 1)}}
	rewritten, marked := dnatted(), dnatted()
	marked.Mark = 3
	slower := dnatted()
	slower.Data[8]--
	behindNAT := func(all ...bpf.NftracePkt) func(s *script) {
		return func(s *script) {
			s.part(filter)
			s.nat(1)
			for i, p := range all {
				s.sawPacket(p, 0)
				s.nft(inChain(uint64(i+2), nftRule(5, NFAccept)))
			}
			again := filter
			again.before = &all[len(all)-1]
			s.part(again)
		}
	}
	for _, tt := range []struct {
		name    string
		run     func(s *script)
		changed bool
		after   uint32 // mark
	}{
		{"no", func(s *script) { s.nft(nftRule(5, NFAccept)); s.part(filter) }, false, 0},
		{"by a rule", func(s *script) { s.saw(3, 0); s.nft(nftRule(5, NFAccept)); s.part(filter) }, true, 3},
		{"between two", func(s *script) {
			s.nft(nftRule(5, NFAccept))
			s.saw(3, between)
			s.nft(inChain(2, nftRule(6, NFAccept)))
			s.part(filter)
		}, true, 3},
		{"and again behind them", func(s *script) {
			s.saw(3, 0)
			s.nft(nftRule(5, NFAccept))
			s.part(filter)
			p := ping()
			p.Mark = 5
			s.after(p)
		}, true, 5},
		{"at the hook before", func(s *script) {
			s.saw(3, 0)
			s.nft(nftRule(5, NFAccept))
			s.part(part{hook: HookPreRouting, before: &bpf.NftracePkt{}})
			s.part(filter)
		}, false, 0},
		{"by NAT only", behindNAT(rewritten), false, 0},
		{"by NAT and a rule", behindNAT(marked), true, 3},
		{"behind NAT", behindNAT(rewritten, marked), true, 3},
		{"perhaps by NAT only, for the mark before is not known", func(s *script) {
			s.seq++
			s.nft(nftRule(5, NFAccept))
			behindNAT(rewritten)(s)
		}, true, 0},
		{"behind NAT, but for its mark", behindNAT(rewritten, slower), true, 0},
	} {
		s := newScript(t, NewAssembler(), 7)
		tt.run(s)
		s.xmit()
		s.end(0)
		j := s.journey()
		i := len(j.Steps) - 1
		for j.Steps[i].Table == nil {
			i--
		}
		p := j.Steps[i].Table.Part
		if p.Changed != tt.changed || (p.Pattern == nil) != tt.changed {
			t.Errorf("%s: changed %v, pattern %p", tt.name, p.Changed, p.Pattern)
		}
		if p.After == nil || p.After.Mark != tt.after {
			t.Errorf("%s: behind it %+v, want mark %d", tt.name, p.After, tt.after)
		}
		next := newScript(t, s.a, 8)
		next.now = s.now + uint64(3*settle)
		next.filter(HookForward)
		next.end(0)
		if p := next.journey().Steps[0].Table.Part; p.Changed {
			t.Errorf("%s: the next journey's, too", tt.name)
		}
	}
}

// Where the kernel skipped the probe of nf_tables, all of what it did at the hook may be missing; of
// packets that nobody wants that is not counted.
func TestNFTAllMissed(t *testing.T) {
	for _, tt := range []struct {
		name string
		flag bpf.NftraceRecFlag
		want Stats
	}{
		{"followed", 0, Stats{Packets: 1, Records: 3, Lost: 1, Skipped: 1}},
		{"not wanted", bpf.NftraceRecFlagREC_F_TENTATIVE, Stats{Records: 3}},
	} {
		a := NewAssembler()
		s := newScript(t, a, 7)
		s.first(HookPreRouting, tt.flag)
		s.first(HookForward, tt.flag|bpf.NftraceRecFlagREC_F_NFTMISSED)
		s.end(tt.flag)
		for _, j := range s.journeys() {
			if j.Lost != tt.want.Lost {
				t.Errorf("%s: %d lost: %s", tt.name, j.Lost, nftShape(j))
			}
		}
		if got := a.Stats(); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// Of a call that NAT divides, both parts' records may say so.
func TestNFTAllMissedInParts(t *testing.T) {
	const missed = bpf.NftraceRecFlagREC_F_NFTMISSED
	a := NewAssembler()
	s := newScript(t, a, 7)
	s.first(HookPreRouting, missed)
	s.nat(1)
	s.first(HookPreRouting, missed)
	s.first(HookForward, missed)
	s.end(0)
	if j := s.journey(); j.Lost != 2 || a.Stats().Skipped != 2 {
		t.Errorf("%d lost, %+v; want 2, for there were 2 calls", j.Lost, a.Stats())
	}
}

// What leaves a device's ingress without a word of nf_tables was sent on by a rule that did not come to
// tell of it, or by somebody else.
func TestSentOn(t *testing.T) {
	ingress := part{hook: HookIngress, pf: PFNetdev}
	for _, tt := range []struct {
		name string
		tell func(*script)
		next func(*script)
		want bool
	}{
		{"transmitted", func(*script) {}, (*script).xmit, true},
		{"egress", func(*script) {}, func(s *script) { s.part(part{hook: HookEgress, pf: PFNetdev}) }, true},
		{"told", func(s *script) { s.nft(nftAccept) }, (*script).xmit, false},
		{"flowtable", (*script).flow, (*script).xmit, false},
		{"received", func(*script) {}, func(s *script) { s.part(part{hook: HookPreRouting}) }, false},
		{"what comes next is lost", func(*script) {}, func(s *script) { s.seq++; s.xmit() }, false},
		{"some of what comes next is lost", func(*script) {}, func(s *script) { s.seq++; s.nft(nftAccept); s.xmit() }, false},
		{"what nf_tables told is lost", func(s *script) { s.seq++ }, (*script).xmit, false},
		{"some of it is lost", func(s *script) { s.seq++; s.saw(3, 0) }, (*script).xmit, false},
		{"it may be missed", func(*script) { ingress.flags = bpf.NftraceRecFlagREC_F_NFTMISSED }, (*script).xmit, false},
	} {
		s := newScript(t, NewAssembler(), 7)
		ingress.flags = 0
		tt.tell(s)
		s.part(ingress)
		tt.next(s)
		s.end(0)
		got := false
		for _, step := range s.journey().Steps {
			got = got || step.SentOn()
		}
		if got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
