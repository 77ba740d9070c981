package events

import (
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/nftrace/nftrace/bpf"
)

// ebt is a REC_EBT.
func (s *script) ebt(name string, hook, verdict uint8, flags bpf.NftraceRecFlag, hits ...bpf.NftraceHit) {
	s.t.Helper()
	r := bpf.NftraceRecEbt{Hdr: s.hdr(bpf.NftraceRecTypeREC_EBT, flags), Private: 0xeb, Gen: 5, Hook: hook, Verdict: verdict, Nhits: uint32(len(hits))}
	copy(bytesOf(&r.Name, unsafe.Sizeof(r.Name)), name)
	copy(r.Hits[:], hits)
	s.add(bytesOf(&r, ebtHits+uintptr(len(hits))*hitSize))
}

// bridged is the record of a bridge's hook.
func (s *script) bridged(hook uint8) {
	p := ping()
	s.part(part{hook: hook, pf: PFBridge, before: &p})
}

// ebtRuns are the runs of ebtables' tables in a journey.
func ebtRuns(j *Journey) (out []*Step) {
	for i := range j.Steps {
		if s := &j.Steps[i]; s.Table != nil && s.Table.EBT != nil {
			out = append(out, s)
		}
	}
	return out
}

func TestEBTRuns(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.ebt("broute", HookBrouting, NFAccept, 0)
	s.ebt("nat", HookPreRouting, NFAccept, 0, hit(0, 3, 1), hit(0, 1, 2))
	s.bridged(HookPreRouting)
	s.ebt("filter", HookForward, NFDrop, 0, hit(0, 2, 1))
	s.bridged(HookForward)
	s.drop()
	j := s.journey()
	if got, want := nftShape(j), "broute=accept, nat=accept, PREROUTING=accept, filter=drop, FORWARD=drop"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if j.HalfSeen != "" || j.Lost != 0 || j.Outcome.Kind != OutDropped || j.Outcome.Step != 3 {
		t.Errorf("half seen %q, %d lost, outcome %+v", j.HalfSeen, j.Lost, j.Outcome)
	}
	runs := ebtRuns(j)
	if len(runs) != 3 {
		t.Fatalf("%d runs", len(runs))
	}
	if r := runs[0].Table; r.EBT.Hook != HookBrouting || runs[0].Hook != HookPreRouting || r.ID != (TableID{0xeb, 5}) || r.After == nil || r.Before.Data == nil {
		t.Errorf("%+v", r)
	}
	if r := runs[1].Table; !slices.Equal(r.Hits, []Hit{{1, 2, 168}, {3, 1, 84}}) {
		t.Errorf("hits %+v", r.Hits)
	}
	if r := runs[2].Table; r.After != nil {
		t.Error("behind a table that dropped it, there is a packet")
	}
}

// Behind table broute's DROP the packet goes on.
func TestEBTBrouted(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.ebt("broute", HookBrouting, NFDrop, 0, hit(0, 0, 1))
	s.bridged(HookPreRouting)
	s.first(HookPreRouting, 0)
	s.device(bpf.NftraceRecTypeREC_DELIVER, 0, dev(4, "eth1"))
	j := s.journey()
	runs := ebtRuns(j)
	if len(runs) != 1 || runs[0].Verdict != NFAccept || runs[0].Table.EBT.Verdict != NFDrop || j.Outcome.Kind != OutDelivered {
		t.Errorf("%d runs, outcome %+v", len(runs), j.Outcome)
	}
}

// At the bridge's PREROUTING nobody but the table says that the packet was dropped.
func TestEBTDropped(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.ebt("nat", HookPreRouting, NFDrop, 0)
	s.bridged(HookPreRouting)
	s.end(0)
	if j := s.journey(); j.Outcome.Kind != OutDropped || j.Outcome.Step != 0 {
		t.Errorf("outcome %+v", j.Outcome)
	}
}

// What a table changed is known to the next one.
func TestEBTChanged(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.ebt("broute", HookBrouting, NFAccept, 0)
	s.saw(7, 0)
	s.ebt("nat", HookPreRouting, NFAccept, 0, hit(0, 0, 1))
	s.nft(nftRule(5, NFAccept))
	s.bridged(HookPreRouting)
	s.xmit()
	s.end(0)
	j := s.journey()
	runs := ebtRuns(j)
	if len(runs) != 2 {
		t.Fatalf("%d runs", len(runs))
	}
	if r := runs[0].Table; r.Before.Mark != 0 || r.After.Mark != 0 || r.EBT.Behind != nil {
		t.Errorf("broute: mark %d, then %d", r.Before.Mark, r.After.Mark)
	}
	if r := runs[1].Table; r.Before.Mark != 0 || r.After.Mark != 7 || r.EBT.Behind == nil {
		t.Errorf("nat: mark %d, then %d", r.Before.Mark, r.After.Mark)
	}
	if e := &j.Steps[2].Table.NFT.Events[0]; e.Packet.Mark != 7 || e.Unsure {
		t.Errorf("nf_tables: mark %d, unsure %v", e.Packet.Mark, e.Unsure)
	}
}

func TestEBTUnresolved(t *testing.T) {
	for flag, why := range map[bpf.NftraceRecFlag]string{
		bpf.NftraceRecFlagREC_F_NOENTRY:  ebtNested,
		bpf.NftraceRecFlagREC_F_REPLACED: unresolved(uint32(bpf.NftraceRecFlagREC_F_REPLACED)),
		bpf.NftraceRecFlagREC_F_TORN:     unresolved(uint32(bpf.NftraceRecFlagREC_F_TORN)),
		bpf.NftraceRecFlagREC_F_NOTABLE:  unresolved(uint32(bpf.NftraceRecFlagREC_F_NOTABLE)),
	} {
		s := newScript(t, NewAssembler(), 7)
		s.ebt("nat", HookPreRouting, NFAccept, flag, hit(0, 0, 1))
		s.ebt("nat", HookPreRouting, NFAccept, 0, hit(0, 0, 1))
		s.bridged(HookPreRouting)
		s.xmit()
		s.end(0)
		runs := ebtRuns(s.journey())
		if len(runs) != 2 || why == "" || runs[0].Table.Unresolved != why || runs[1].Table.Unresolved != "" {
			t.Errorf("%#x: %q, want %q", flag, runs[0].Table.Unresolved, why)
		}
	}
}

// Where a record is lost, a run before it may have changed the packet unseen.
func TestEBTGap(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.ebt("broute", HookBrouting, NFAccept, 0)
	s.seq++
	s.ebt("nat", HookPreRouting, NFAccept, 0, hit(0, 0, 1))
	s.bridged(HookPreRouting)
	s.ebt("filter", HookForward, NFAccept, 0)
	s.bridged(HookForward)
	s.xmit()
	s.end(0)
	var got []string
	for _, run := range ebtRuns(s.journey()) {
		got = append(got, run.Table.Name+" "+run.Table.Unresolved)
	}
	if want := []string{"nat " + nftGap, "filter "}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What was handed out is used again, for a journey that knows nothing of it.
func TestEBTReuse(t *testing.T) {
	a := NewAssembler()
	now := uint64(0)
	var first *Step
	for i, tt := range []struct {
		run  func(s *script)
		want string
	}{
		{func(s *script) { s.ebt("nat", HookForward, NFAccept, 0); s.first(HookForward, 0) }, "ebtables nat"},
		{func(s *script) { s.filter(HookForward) }, "xtables filter"},
		{func(s *script) { s.ebt("nat", HookForward, NFAccept, 0); s.first(HookForward, 0) }, "ebtables nat"},
		{func(s *script) { s.nft(nftRule(5, NFAccept)); s.first(HookForward, 0) }, "nf_tables"},
		{func(s *script) { s.ebt("nat", HookForward, NFAccept, 0); s.first(HookForward, 0) }, "ebtables nat"},
		{func(s *script) { s.flow(); s.first(HookForward, 0) }, "flowtable"},
		{func(s *script) { s.filter(HookForward) }, "xtables filter"},
	} {
		s := newScript(t, a, uint64(i))
		s.now += now
		tt.run(s)
		s.end(0)
		now = s.now + uint64(3*settle)
		j := a.Idle(time.Duration(s.now) + 2*settle)[0]
		st := &j.Steps[0]
		if first == nil {
			first = st
		}
		var got []string
		if f := st.Flowtable; f != nil {
			got = append(got, "flowtable")
		}
		if r := st.Table; r != nil {
			if r.NFT != nil {
				got = append(got, "nf_tables")
			}
			if r.EBT != nil {
				got = append(got, "ebtables "+r.Name)
			}
			if r.NFT == nil && r.EBT == nil {
				got = append(got, "xtables "+r.Name)
			}
		}
		if st != first || !slices.Equal(got, []string{tt.want}) {
			t.Errorf("journey %d: %q, want %q; used again: %v", i, got, tt.want, st == first)
		}
	}
}

func TestEBTBadRecords(t *testing.T) {
	r := bpf.NftraceRecEbt{Nhits: 2}
	r.Hdr.Type = uint16(bpf.NftraceRecTypeREC_EBT)
	for name, raw := range map[string][]byte{
		"short":        bytesOf(&r, ebtHits-8),
		"a hit fewer":  bytesOf(&r, ebtHits+hitSize),
		"without hits": bytesOf(&r, ebtHits),
	} {
		if _, err := NewAssembler().Add(raw); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	r.Nhits = uint32(len(r.Hits) + 1)
	long := append(bytesOf(&r, unsafe.Sizeof(r)), make([]byte, hitSize)...)
	if _, err := NewAssembler().Add(long); err == nil {
		t.Error("more hits than fit: taken")
	}
}

// ebtScripts are journeys for FuzzAdd to begin with.
var ebtScripts = []func(s *script){
	func(s *script) {
		s.ebt("broute", HookBrouting, NFAccept, 0)
		s.saw(3, 0)
		s.ebt("nat", HookPreRouting, NFDrop, 0, hit(0, 1, 1))
		s.bridged(HookPreRouting)
	},
}
