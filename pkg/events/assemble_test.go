package events

import (
	"net/netip"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/nftrace/nftrace/bpf"
)

// script writes records of one journey as the probes do.
type script struct {
	t     *testing.T
	a     *Assembler
	jid   uint64
	netns uint32
	seq   uint32
	now   uint64
	done  []*Journey
}

func newScript(t *testing.T, a *Assembler, jid uint64) *script {
	return &script{t: t, a: a, jid: jid, netns: 77, now: uint64(time.Second)}
}

func (s *script) hdr(typ bpf.NftraceRecType, flags bpf.NftraceRecFlag) bpf.NftraceRecHdr {
	s.now += 1000
	h := bpf.NftraceRecHdr{Ts: s.now, Jid: s.jid, Seq: s.seq, Netns: s.netns, Type: uint16(typ), Flags: uint32(flags)}
	s.seq++
	return h
}

func bytesOf[T any](v *T, size uintptr) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), size)
}

func (s *script) add(raw []byte) {
	s.t.Helper()
	js, err := s.a.Add(raw)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, j := range js { // valid until the next call only
		kept := *j
		kept.Steps = slices.Clone(j.Steps)
		s.done = append(s.done, &kept)
	}
}

func dev(index uint32, name string) bpf.NftraceDev {
	d := bpf.NftraceDev{Ifindex: index}
	for i := range name {
		d.Name[i] = int8(name[i])
	}
	return d
}

// ping is an ICMP echo request of 84 bytes from 10.0.0.1 to 10.0.0.2.
func ping() bpf.NftracePkt {
	p := bpf.NftracePkt{Len: 84, Ethertype: 0x0800, Cap: 28}
	copy(p.Data[:], []byte{
		0x45, 0, 0, 84, 0, 1, 0x40, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
		8, 0, 0, 0, 0, 5, 0, 1,
	})
	return p
}

func (s *script) start(hook uint8, flags bpf.NftraceRecFlag) {
	r := bpf.NftraceRecHook{Hdr: s.hdr(bpf.NftraceRecTypeREC_START, flags), Pkt: ping()}
	r.Place.Hook, r.Place.Pf = hook, PFIPv4
	r.Place.In = dev(3, "eth0")
	s.add(bytesOf(&r, unsafe.Sizeof(r)))
}

func (s *script) hook(hook uint8, ret int32, flags bpf.NftraceRecFlag) {
	r := bpf.NftraceRecHook{Hdr: s.hdr(bpf.NftraceRecTypeREC_HOOK, flags), Ret: ret}
	r.Place.Hook, r.Place.Pf = hook, PFIPv4
	s.add(bytesOf(&r, unsafe.Offsetof(r.Pkt)))
}

func (s *script) table(hook uint8, verdict uint32, flags bpf.NftraceRecFlag, hits ...bpf.NftraceHit) {
	r := bpf.NftraceRecTable{
		Hdr: s.hdr(bpf.NftraceRecTypeREC_TABLE, flags), Private: 0xabc, Gen: 1,
		Verdict: verdict, Nhits: uint32(len(hits)), Before: ping(),
	}
	copy(bytesOf(&r.Table, unsafe.Sizeof(r.Table)), "filter")
	r.Place.Hook, r.Place.Pf, r.Place.Physin = hook, PFIPv4, 3
	copy(r.Hits[:], hits)
	s.add(bytesOf(&r, unsafe.Offsetof(r.Hits)+uintptr(len(hits))*unsafe.Sizeof(r.Hits[0])))
}

func (s *script) device(typ bpf.NftraceRecType, flags bpf.NftraceRecFlag, d bpf.NftraceDev) {
	r := bpf.NftraceRecDev{Hdr: s.hdr(typ, flags), Dev: d}
	s.add(bytesOf(&r, unsafe.Sizeof(r)))
}

func (s *script) end(flags bpf.NftraceRecFlag) {
	h := s.hdr(bpf.NftraceRecTypeREC_END, flags)
	s.add(bytesOf(&h, unsafe.Sizeof(h)))
}

// journeys ends the script well after its last record.
func (s *script) journeys() []*Journey {
	return append(s.done, s.a.Idle(time.Duration(s.now)+2*settle)...)
}

func TestOutcome(t *testing.T) {
	const none = bpf.NftraceRecFlag(0)
	accept := bpf.NftraceHit{Index: 4, Packets: 1, Bytes: 84}
	for _, tt := range []struct {
		name string
		run  func(s *script)
		want Outcome
	}{
		{"forwarded", func(s *script) {
			s.start(HookPreRouting, none)
			s.table(HookForward, NFAccept, none, accept)
			s.hook(HookForward, 1, none)
			s.device(bpf.NftraceRecTypeREC_XMIT, none, dev(4, "eth1"))
			s.end(none)
		}, Outcome{Kind: OutSent, Device: Device{4, "eth1"}, Step: 2, Rule: -1}},
		{"delivered", func(s *script) {
			s.start(HookPreRouting, none)
			s.table(HookLocalIn, NFAccept, none, accept)
			s.hook(HookLocalIn, 1, none)
			s.device(bpf.NftraceRecTypeREC_DELIVER, none, dev(3, "eth0"))
		}, Outcome{Kind: OutDelivered, Device: Device{3, "eth0"}, Step: -1, Rule: -1}},
		{"dropped by a table; the hook returns after the packet is gone", func(s *script) {
			s.start(HookPreRouting, none)
			s.table(HookForward, NFDrop, none, accept)
			s.end(none)
			s.seq = seqAfterEnd
			s.hook(HookForward, -1, none)
		}, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{"dropped by a hook without a table", func(s *script) {
			s.start(HookPreRouting, none)
			s.end(none)
			s.seq = seqAfterEnd
			s.hook(HookPreRouting, -1, none)
		}, Outcome{Kind: OutDropped, Step: 0, Rule: -1}},
		{"stolen: a fragment waits for the others", func(s *script) {
			s.start(HookPreRouting, none)
			s.hook(HookPreRouting, 0, none)
			s.end(none)
		}, Outcome{Kind: OutStolen, Step: 0, Rule: -1}},
		{"dropped below br_netfilter: the hooks above return later", func(s *script) {
			s.start(HookPreRouting, none)
			s.device(bpf.NftraceRecTypeREC_XMIT, none, dev(4, "eth0"))
			s.netns = 78
			s.end(none)
			s.seq = seqAfterEnd
			s.hook(HookForward, -1, none)
			s.seq = seqAfterEnd
			s.hook(HookPreRouting, 0, none)
		}, Outcome{Kind: OutDropped, Step: 1, Rule: -1}},
		{"sent to a namespace that kept it", func(s *script) {
			s.start(HookPreRouting, none)
			s.device(bpf.NftraceRecTypeREC_XMIT, none, dev(4, "eth0"))
			s.netns = 78
			s.hook(HookPreRouting, 0, none)
			s.end(none)
		}, Outcome{Kind: OutStolen, Step: 1, Rule: -1}},
		{"queued", func(s *script) {
			s.start(HookPreRouting, none)
			s.table(HookForward, NFQueue|5<<16, none, accept)
			s.end(none)
		}, Outcome{Kind: OutQueued, Step: 0, Rule: -1}},
		{"freed, nobody knows why", func(s *script) {
			s.start(HookPreRouting, none)
			s.hook(HookPreRouting, 1, none)
			s.end(none)
		}, Outcome{Kind: OutFreed, Step: -1, Rule: -1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, NewAssembler(), 7)
			tt.run(s)
			js := s.journeys()
			if len(js) != 1 {
				t.Fatalf("%d journeys, want 1", len(js))
			}
			if js[0].Outcome != tt.want {
				t.Errorf("outcome %+v, want %+v", js[0].Outcome, tt.want)
			}
			if js[0].Lost != 0 || js[0].HalfSeen != "" {
				t.Errorf("lost %d, half seen %q", js[0].Lost, js[0].HalfSeen)
			}
		})
	}
}

func TestUnfinishedJourneysComeWithFlush(t *testing.T) {
	a := NewAssembler()
	s := newScript(t, a, 7)
	s.start(HookPreRouting, 0)
	if js := s.journeys(); len(js) != 0 {
		t.Fatalf("%d journeys before the end", len(js))
	}
	js := a.Flush()
	if len(js) != 1 || js[0].Outcome.Kind != OutUnknown {
		t.Fatalf("Flush gave %+v", js)
	}
	if again := a.Flush(); len(again) != 0 {
		t.Fatalf("Flush gave %d journeys twice", len(again))
	}
}

func TestHolesAreCounted(t *testing.T) {
	a := NewAssembler()
	s := newScript(t, a, 7)
	s.start(HookPreRouting, 0)
	s.seq += 3 // records that found the buffer full
	s.end(bpf.NftraceRecFlagREC_F_HOLE)
	js := s.journeys()
	if len(js) != 1 || js[0].Lost != 4 || a.Stats().Lost != 4 {
		t.Fatalf("%+v, stats %+v: want 4 lost", js, a.Stats())
	}
}

// A packet that is followed tentatively is handed out only if the filter matched.
func TestTentative(t *testing.T) {
	const tentative = bpf.NftraceRecFlagREC_F_TENTATIVE
	a := NewAssembler()
	s := newScript(t, a, 7)
	s.start(HookPreRouting, tentative)
	s.table(HookPreRouting, NFAccept, tentative)
	s.end(tentative)
	if js := s.journeys(); len(js) != 0 {
		t.Fatalf("a packet that never matched was handed out: %+v", js[0])
	}
	s = newScript(t, a, 8)
	s.start(HookPreRouting, tentative)
	s.table(HookPreRouting, NFAccept, tentative)
	s.table(HookForward, NFAccept, 0)
	s.end(0)
	js := s.journeys()
	if len(js) != 1 || len(js[0].Steps) != 2 {
		t.Fatalf("want the whole path, got %+v", js)
	}
	if got := len(a.Flush()); got != 0 {
		t.Fatalf("%d journeys left", got)
	}
}

func TestHalfSeen(t *testing.T) {
	s := newScript(t, NewAssembler(), 7)
	s.start(HookForward, bpf.NftraceRecFlagREC_F_LATE)
	s.end(0)
	js := s.journeys()
	if len(js) != 1 || js[0].HalfSeen == "" {
		t.Fatalf("not marked as half seen: %+v", js)
	}
}

func TestTableStep(t *testing.T) {
	a := NewAssembler()
	var runs []Run
	a.OnRun = func(r Run) { runs = append(runs, r) }
	s := newScript(t, a, 7)
	s.start(HookPreRouting, 0)
	s.table(HookForward, NFAccept, bpf.NftraceRecFlagREC_F_ATOMIC,
		bpf.NftraceHit{Index: 4, Packets: 1, Bytes: 84}, bpf.NftraceHit{Index: 9, Packets: 2, Bytes: 168})
	s.table(HookForward, NFAccept, bpf.NftraceRecFlagREC_F_SHARED)
	s.table(HookForward, NFAccept, bpf.NftraceRecFlagREC_F_TORN)
	s.end(0)
	js := s.journeys()
	if len(js) != 1 || len(js[0].Steps) != 3 {
		t.Fatalf("got %+v", js)
	}
	st := js[0].Steps[0]
	if st.Table.Name != "filter" || st.Table.ID != (TableID{0xabc, 1}) || st.Netns != 77 {
		t.Errorf("table %+v", st.Table)
	}
	if want := (Hit{9, 2, 168}); len(st.Table.Hits) != 2 || st.Table.Hits[1] != want {
		t.Errorf("hits %+v", st.Table.Hits)
	}
	if st.PhysIn.Name != "eth0" {
		t.Errorf("bridge port %+v: the name was seen before", st.PhysIn)
	}
	if !js[0].Steps[1].Table.Shared || js[0].Steps[2].Table.Unresolved == "" {
		t.Errorf("flags were not taken over")
	}
	if len(runs) != 3 || !runs[0].Alone || runs[1].Alone {
		t.Errorf("OnRun saw %+v, want 3 runs, the first alone", runs)
	}
}

// What was handed out is used again, for a journey that knows nothing of it. Runs that OnRun
// may keep are left alone.
func TestReuse(t *testing.T) {
	a := NewAssembler()
	var kept []Run
	a.OnRun = func(r Run) {
		if !r.Alone {
			kept = append(kept, r)
		}
	}
	s := newScript(t, a, 7)
	s.start(HookForward, bpf.NftraceRecFlagREC_F_LATE)
	s.table(HookForward, NFAccept, bpf.NftraceRecFlagREC_F_TORN, bpf.NftraceHit{Index: 4, Packets: 1, Bytes: 84})
	s.table(HookForward, NFAccept, bpf.NftraceRecFlagREC_F_ATOMIC|bpf.NftraceRecFlagREC_F_ALIVE, bpf.NftraceHit{Index: 5, Packets: 1, Bytes: 84})
	s.seq++
	s.end(0)
	first := a.Idle(time.Duration(s.now) + 2*settle)[0]
	reused := first.Steps[1].Table

	next := newScript(t, a, 8)
	next.now = s.now + uint64(3*settle)
	next.start(HookPreRouting, 0)
	next.table(HookPreRouting, NFDrop, bpf.NftraceRecFlagREC_F_ATOMIC, bpf.NftraceHit{Index: 9, Packets: 1, Bytes: 84})
	next.end(0)
	j := a.Idle(time.Duration(next.now) + 2*settle)[0]
	if j != first || j.Steps[0].Table != reused {
		t.Error("nothing was used again")
	}
	if j.ID != 8 || j.HalfSeen != "" || j.Lost != 0 || len(j.Steps) != 1 {
		t.Errorf("the journey has something of the one before: %+v", j)
	}
	if run := j.Steps[0].Table; len(run.Hits) != 1 || run.Hits[0].Index != 9 || run.After.Data != nil {
		t.Errorf("the run has something of the one before: %+v", run)
	}
	if k := kept[0].Step; len(kept) != 1 || k.Hook != HookForward || k.Table.Hits[0].Index != 4 || k.Table.Unresolved == "" {
		t.Errorf("a run that was kept has changed: %+v", k)
	}
}

func TestTuple(t *testing.T) {
	v6 := func(next uint8, rest ...byte) Packet {
		b := make([]byte, 40, 40+len(rest))
		b[0], b[6] = 0x60, next
		b[23], b[39] = 1, 2
		return Packet{Family: PFIPv6, Data: append(b, rest...)}
	}
	addr := netip.MustParseAddr
	for _, tt := range []struct {
		name  string
		p     Packet
		want  Tuple
		later bool
	}{
		{"ICMP", Packet{Family: PFIPv4, Data: func() []byte { p := ping(); return p.Data[:28] }()},
			Tuple{1, netip.AddrPortFrom(addr("10.0.0.1"), 5), netip.AddrPortFrom(addr("10.0.0.2"), 5)}, false},
		{"cut off", Packet{Family: PFIPv4, Data: make([]byte, 19)}, Tuple{}, false},
		{"hop-by-hop, then UDP", v6(0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 53, 0, 54, 0, 8, 0, 0),
			Tuple{17, netip.AddrPortFrom(addr("::1"), 53), netip.AddrPortFrom(addr("::2"), 54)}, false},
		{"later fragment", v6(44, 17, 0, 0, 8, 0, 0, 0, 1, 0, 53, 0, 54),
			Tuple{17, netip.AddrPortFrom(addr("::1"), 0), netip.AddrPortFrom(addr("::2"), 0)}, true},
	} {
		got, later := tt.p.Tuple()
		if got != tt.want || later != tt.later {
			t.Errorf("%s: %+v %v, want %+v %v", tt.name, got, later, tt.want, tt.later)
		}
	}
}

// Whatever comes out of the buffer: no panic, every journey is counted, and outcomes
// point at steps that there are.
func FuzzAdd(f *testing.F) {
	var r bpf.NftraceRecTable
	r.Hdr.Type = uint16(bpf.NftraceRecTypeREC_TABLE)
	r.Nhits = 3
	f.Add(bytesOf(&r, unsafe.Offsetof(r.Hits)+3*unsafe.Sizeof(r.Hits[0])))
	h := bpf.NftraceRecHook{Hdr: bpf.NftraceRecHdr{Type: uint16(bpf.NftraceRecTypeREC_START)}, Pkt: ping()}
	f.Add(bytesOf(&h, unsafe.Sizeof(h)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		a := NewAssembler()
		var got uint64
		check := func(js []*Journey) {
			for _, j := range js {
				got++
				if o := j.Outcome; o.Step >= len(j.Steps) {
					t.Fatalf("outcome %+v of %d steps", o, len(j.Steps))
				}
			}
		}
		// The input is a sequence of records, each as long as its last byte says.
		for len(raw) > 0 {
			n := min(len(raw), 1+int(raw[len(raw)-1])*8)
			rec := append(make([]byte, 0, n+8), raw[:n]...) // 8-byte aligned
			raw = raw[n:]
			js, _ := a.Add(rec)
			check(js)
		}
		check(a.Flush())
		if n := a.Stats().Packets; n != got || len(a.open) != 0 {
			t.Fatalf("%d journeys came, %d were counted, %d are left", got, n, len(a.open))
		}
	})
}
