package main

import (
	"io"
	"testing"
	"time"
	"unsafe"

	"github.com/nftrace/nftrace/bpf"
	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/render"
)

// BenchmarkPacket takes a packet from its records in the ring buffer to its lines. In a
// VM that counts instructions (vm -icount) its ns/op are instructions.
func BenchmarkPacket(b *testing.B) {
	for _, tt := range []struct {
		format string
		render render.Renderer
	}{
		{"trace", render.NewTrace(render.TraceOptions{})},
		{"tree", render.NewTree(render.TreeOptions{})},
		{"json", render.NewJSON()},
	} {
		b.Run(tt.format, func(b *testing.B) {
			s, records := forwarded(b)
			s.out.Renderer = tt.render
			b.ReportAllocs()
			for b.Loop() {
				another(b, s, records)
			}
			checkPrinted(b, s)
		})
	}
}

// In the long run a packet's lines cost no memory.
func TestPacketAllocates(t *testing.T) {
	s, records := forwarded(t)
	s.out.Renderer = render.NewTrace(render.TraceOptions{})
	for range 3 {
		another(t, s, records)
	}
	if n := testing.AllocsPerRun(100, func() { another(t, s, records) }); n != 0 {
		t.Errorf("%v allocations per packet", n)
	}
	checkPrinted(t, s)
}

// another gives a session the records of one more packet, which changes them.
func another(tb testing.TB, s *session, records [][]byte) {
	// More than settle apart, for that is how long packets are kept.
	const apart = 25 * time.Millisecond
	for _, raw := range records {
		h := (*bpf.NftraceRecHdr)(unsafe.Pointer(&raw[0]))
		h.Jid++
		h.Ts += uint64(apart)
		if err := s.record(raw); err != nil {
			tb.Fatal(err)
		}
	}
}

func checkPrinted(tb testing.TB, s *session) {
	tb.Helper()
	if s.printed == 0 || s.res.unresolved != 0 || s.asm.Stats().Bad != 0 || s.asm.Stats().Lost != 0 {
		tb.Fatalf("void: %d packets printed, %d unresolved, %+v", s.printed, s.res.unresolved, s.asm.Stats())
	}
}

// forwarded returns the records of a packet as Docker's rules have it on its way from a
// container to the world, and a session that knows its tables. All tables are at one
// hook, for those made for tests have but one.
func forwarded(tb testing.TB) (*session, [][]byte) {
	out := &output{pipe: -1, w: io.Discard}
	s := &session{c: &config{}, asm: events.NewAssembler(), res: newResolver(nil, newRulesets(nil, nil, nil), nil, nil, false), out: out}
	s.asm.OnRun = s.run
	for inum, name := range map[uint32]string{1: "c2", 2: "", 3: "ext"} {
		s.res.names[inum] = name
	}
	table := func(name string, input, user []rule) bpf.NftraceHookTable {
		id := uint64(len(s.res.tables.known) + 1)
		t := bpf.NftraceHookTable{Private: id << 12, Gen: id}
		s.res.tables.keep(&ruleset{id: events.TableID{Private: t.Private, Gen: t.Gen}, table: namedTable(tb, name, input, user)})
		for i := range name {
			t.Name[i] = int8(name[i])
		}
		return t
	}
	// As the kernel lists them: the last one that was made is the first.
	pre := []bpf.NftraceHookTable{table("nat", nil, nil), table("raw", nil, nil), table("mangle", nil, nil)}
	forward := []bpf.NftraceHookTable{table("mangle", nil, nil), table("filter", []rule{
		{cond: true, target: "jump U"}, {cond: true, target: "jump U"}, {cond: true}, {cond: true, target: "jump U"},
	}, []rule{{cond: true}})}
	post := []bpf.NftraceHookTable{table("nat", []rule{{cond: true, target: "MASQUERADE"}}, nil), table("mangle", nil, nil)}
	hit := func(table, index, packets int) bpf.NftraceHit {
		return bpf.NftraceHit{Table: uint16(table), Index: uint32(index), Packets: uint16(packets), Bytes: uint64(84 * packets)}
	}

	r := &recorder{}
	none, eth0, docker, veth, eth := dev(0, ""), dev(2, "eth0"), dev(2, "docker0"), dev(4, "vethc2"), dev(5, "eth0")
	r.netns = 1
	r.hook(events.PFIPv4, none, eth0, nil) // OUTPUT
	r.hook(events.PFIPv4, none, eth0, nil)
	r.device(bpf.NftraceRecTypeREC_XMIT, eth0)
	r.netns, r.port = 2, 4
	r.hook(events.PFBridge, veth, none, nil) // PREROUTING
	r.hook(events.PFIPv4, docker, none, pre, hit(0, 0, 1), hit(1, 0, 1), hit(2, 0, 1))
	r.tracked = true
	r.after()
	r.hook(events.PFBridge, veth, none, nil)
	r.hook(events.PFIPv4, docker, none, pre)
	r.hops++
	r.hook(events.PFIPv4, docker, eth, forward,
		hit(0, 0, 1), hit(1, 0, 1), hit(1, 1, 1), hit(1, 3, 1), hit(1, 4, 1), hit(1, 6, 3), hit(1, 7, 3))
	r.port = 0
	r.hook(events.PFIPv4, none, eth, post, hit(0, 0, 1), hit(1, 0, 1)) // POSTROUTING
	r.nat()
	r.source, r.behind = 9, true
	r.hook(events.PFIPv4, none, eth, post)
	r.behind = false
	r.device(bpf.NftraceRecTypeREC_XMIT, eth)
	r.netns = 3
	r.hook(events.PFIPv4, dev(2, "eth1"), none, nil) // PREROUTING
	r.device(bpf.NftraceRecTypeREC_DELIVER, dev(2, "eth1"))
	r.end()
	return s, r.records
}

// recorder writes the records of one packet as the probes do.
type recorder struct {
	netns   uint32
	port    uint32 // of the bridge that it came through
	hops    byte   // that it made
	source  byte   // of its address
	tracked bool   // by conntrack
	behind  bool   // the next part lies behind a rewrite
	pkt     func(p *bpf.NftracePkt)
	records [][]byte
}

func (r *recorder) header(typ bpf.NftraceRecType) bpf.NftraceRecHdr {
	seq := uint32(len(r.records))
	return bpf.NftraceRecHdr{Ts: uint64(time.Second) + uint64(seq), Jid: 1, Seq: seq, Netns: r.netns, Type: uint16(typ)}
}

func add[T any](r *recorder, rec *T, size uintptr) {
	r.records = append(r.records, unsafe.Slice((*byte)(unsafe.Pointer(rec)), size))
}

func dev(index uint32, name string) bpf.NftraceDev {
	d := bpf.NftraceDev{Ifindex: index}
	for i := range name {
		d.Name[i] = int8(name[i])
	}
	return d
}

func (r *recorder) packet() bpf.NftracePkt {
	p := bpf.NftracePkt{Len: 84, Ethertype: 0x0800, DevType: 1, Cap: 84, MacLen: 14}
	if r.tracked {
		p.Ctinfo, p.Flags = 2, uint8(bpf.NftracePktFlagPKT_F_CT)
	}
	copy(p.Mac[:], []byte{2, 0, 0xac, 0x11, 0, 1, 2, 0, 0xac, 0x11, 0, 3, 8, 0})
	copy(p.Data[:], []byte{
		0x45, 0, 0, 84, 0xec, 0x28, 0x40, 0, 64 - r.hops, 17, 0x60, 0x80, 10, 17, r.source, 3, 10, 211, 55, 1,
		0xe5, 0x57, 0x12, 0x67, 0, 64, 0xee, 0x41,
	})
	if r.pkt != nil {
		r.pkt(&p)
	}
	return p
}

func (r *recorder) hook(pf uint8, in, out bpf.NftraceDev, tables []bpf.NftraceHookTable, hits ...bpf.NftraceHit) {
	rec := &bpf.NftraceRecHook{Hdr: r.header(bpf.NftraceRecTypeREC_HOOK), Before: r.packet()}
	if r.behind {
		rec.Hdr.Flags = uint32(bpf.NftraceRecFlagREC_F_SPLIT)
	}
	rec.Place = bpf.NftracePlace{In: in, Out: out, Physin: r.port, Hook: events.HookLocalIn, Pf: pf}
	rec.Ntables, rec.Nhits = uint32(copy(rec.Tables[:], tables)), uint32(copy(rec.Hits[:], hits))
	ran := map[uint16]bool{}
	for i := range hits {
		ran[hits[i].Table] = true
	}
	rec.Runs = uint32(len(ran))
	size := unsafe.Offsetof(rec.Hits) + uintptr(len(hits))*unsafe.Sizeof(rec.Hits[0])
	switch {
	case tables != nil:
	case len(r.records) == 0 || r.behind:
		size = unsafe.Offsetof(rec.Nhits)
	default:
		size = unsafe.Offsetof(rec.Before)
	}
	add(r, rec, size)
}

func (r *recorder) after() {
	rec := &bpf.NftraceRecPkt{Hdr: r.header(bpf.NftraceRecTypeREC_AFTER), Pkt: r.packet()}
	add(r, rec, unsafe.Sizeof(*rec))
}

func (r *recorder) nat() {
	rec := &bpf.NftraceRecNat{Hdr: r.header(bpf.NftraceRecTypeREC_NAT)}
	add(r, rec, unsafe.Sizeof(*rec))
}

func (r *recorder) device(typ bpf.NftraceRecType, d bpf.NftraceDev) {
	rec := &bpf.NftraceRecDev{Hdr: r.header(typ), Dev: d}
	add(r, rec, unsafe.Sizeof(*rec))
}

func (r *recorder) end() {
	rec := &bpf.NftraceRecHdr{}
	*rec = r.header(bpf.NftraceRecTypeREC_END)
	add(r, rec, unsafe.Sizeof(*rec))
}
