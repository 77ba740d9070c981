package main

import (
	"bufio"
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
		render func(io.Writer) render.Renderer
	}{
		{"trace", render.NewTrace},
		{"tree", func(w io.Writer) render.Renderer { return render.NewTree(w, render.TreeOptions{}) }},
		{"json", render.NewJSON},
	} {
		b.Run(tt.format, func(b *testing.B) {
			s, records := forwarded(b)
			s.out.Renderer = tt.render(s.out.buf)
			// More than settle apart, for that is how long packets are kept.
			const apart = 25 * time.Millisecond
			b.ReportAllocs()
			for b.Loop() {
				for _, raw := range records {
					h := (*bpf.NftraceRecHdr)(unsafe.Pointer(&raw[0]))
					h.Jid++
					h.Ts += uint64(apart)
					if err := s.record(raw); err != nil {
						b.Fatal(err)
					}
				}
			}
			if s.printed == 0 || s.res.unresolved != 0 || s.asm.Stats().Bad != 0 || s.asm.Stats().Lost != 0 {
				b.Fatalf("void: %d packets printed, %d unresolved, %+v", s.printed, s.res.unresolved, s.asm.Stats())
			}
		})
	}
}

// forwarded returns the records of a packet as Docker's rules have it on its way from a
// container to the world, and a session that knows its tables. All of them are at
// one hook, for tables made for tests have but one.
func forwarded(tb testing.TB) (*session, [][]byte) {
	out := &output{pipe: -1}
	out.buf = bufio.NewWriterSize(io.Discard, 64<<10)
	s := &session{c: &config{}, asm: events.NewAssembler(), res: newResolver(nil, nil, nil, false), out: out}
	s.asm.OnRun = s.run
	for inum, name := range map[uint32]string{1: "c2", 2: "", 3: "ext"} {
		s.res.names[inum] = name
	}
	few := inputTable(tb, nil, nil)
	jumps := inputTable(tb, []rule{
		{cond: true, target: "jump U"}, {cond: true, target: "jump U"}, {cond: true}, {cond: true, target: "jump U"},
	}, []rule{{cond: true}})
	s.res.keep(&ruleset{id: events.TableID{Private: 1, Gen: 1}, table: few})
	s.res.keep(&ruleset{id: events.TableID{Private: 2, Gen: 2}, table: jumps})
	policy := []bpf.NftraceHit{{Index: 0, Packets: 1, Bytes: 84}}
	chains := []bpf.NftraceHit{
		{Index: 0, Packets: 1, Bytes: 84}, {Index: 1, Packets: 1, Bytes: 84}, {Index: 3, Packets: 1, Bytes: 84},
		{Index: 4, Packets: 1, Bytes: 84}, {Index: 6, Packets: 3, Bytes: 252}, {Index: 7, Packets: 3, Bytes: 252},
	}

	r := &recorder{}
	none, docker, eth := dev(0, ""), dev(2, "docker0"), dev(5, "eth0")
	r.netns = 1
	r.hook(bpf.NftraceRecTypeREC_START, none, dev(2, "eth0"))
	r.hook(bpf.NftraceRecTypeREC_HOOK, none, dev(2, "eth0"))
	r.device(bpf.NftraceRecTypeREC_XMIT, dev(2, "eth0"))
	r.netns = 2
	r.table("raw", 1, docker, none, policy)
	r.table("mangle", 1, docker, none, policy)
	r.hook(bpf.NftraceRecTypeREC_HOOK, docker, none)
	r.hook(bpf.NftraceRecTypeREC_HOOK, dev(4, "vethc2"), none)
	r.hook(bpf.NftraceRecTypeREC_HOOK, dev(4, "vethc2"), none)
	r.hops++
	r.table("mangle", 1, docker, eth, policy)
	r.table("filter", 2, docker, eth, chains)
	r.hook(bpf.NftraceRecTypeREC_HOOK, docker, eth)
	r.table("mangle", 1, none, eth, policy)
	r.nat(0, 2)
	r.nat(bpf.NftraceRecFlagREC_F_NAT_AFTER, 9)
	r.hook(bpf.NftraceRecTypeREC_HOOK, none, eth)
	r.device(bpf.NftraceRecTypeREC_XMIT, eth)
	r.netns = 3
	r.hook(bpf.NftraceRecTypeREC_HOOK, dev(2, "eth1"), none)
	r.device(bpf.NftraceRecTypeREC_DELIVER, dev(2, "eth1"))
	return s, r.records
}

// recorder writes the records of one packet as the probes do.
type recorder struct {
	netns   uint32
	hops    byte // that it made
	records [][]byte
}

func (r *recorder) header(typ bpf.NftraceRecType, flags bpf.NftraceRecFlag) bpf.NftraceRecHdr {
	seq := uint32(len(r.records))
	return bpf.NftraceRecHdr{Ts: uint64(time.Second) + uint64(seq), Jid: 1, Seq: seq, Netns: r.netns, Type: uint16(typ), Flags: uint32(flags)}
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
	p := bpf.NftracePkt{Len: 84, Ethertype: 0x0800, DevType: 1, Cap: 84, MacLen: 14, Ctinfo: 2, Flags: uint8(bpf.NftracePktFlagPKT_F_CT)}
	copy(p.Mac[:], []byte{2, 0, 0xac, 0x11, 0, 1, 2, 0, 0xac, 0x11, 0, 3, 8, 0})
	copy(p.Data[:], []byte{
		0x45, 0, 0, 84, 0xec, 0x28, 0x40, 0, 64 - r.hops, 17, 0x60, 0x80, 10, 17, 0, 3, 10, 211, 55, 1,
		0xe5, 0x57, 0x12, 0x67, 0, 64, 0xee, 0x41,
	})
	return p
}

func place(in, out bpf.NftraceDev) bpf.NftracePlace {
	return bpf.NftracePlace{In: in, Out: out, Hook: events.HookLocalIn, Pf: events.PFIPv4}
}

func (r *recorder) hook(typ bpf.NftraceRecType, in, out bpf.NftraceDev) {
	rec := &bpf.NftraceRecHook{Hdr: r.header(typ, 0), Place: place(in, out), Ret: 1}
	size := unsafe.Offsetof(rec.Pkt)
	if typ == bpf.NftraceRecTypeREC_START {
		rec.Pkt = r.packet()
		size = unsafe.Sizeof(*rec)
	}
	add(r, rec, size)
}

func (r *recorder) table(name string, id uint64, in, out bpf.NftraceDev, hits []bpf.NftraceHit) {
	rec := &bpf.NftraceRecTable{
		Hdr:   r.header(bpf.NftraceRecTypeREC_TABLE, bpf.NftraceRecFlagREC_F_ALIVE|bpf.NftraceRecFlagREC_F_ATOMIC),
		Place: place(in, out), Private: id, Gen: id, Verdict: events.NFAccept, Nhits: uint32(len(hits)), Before: r.packet(),
	}
	if in.Ifindex != 0 {
		rec.Place.Physin = 4
	}
	for i := range name {
		rec.Table[i] = int8(name[i])
	}
	add(r, rec, unsafe.Offsetof(rec.Hits)+uintptr(copy(rec.Hits[:], hits))*unsafe.Sizeof(rec.Hits[0]))
}

func (r *recorder) nat(flags bpf.NftraceRecFlag, source byte) {
	rec := &bpf.NftraceRecNat{Hdr: r.header(bpf.NftraceRecTypeREC_NAT, flags), Pkt: r.packet()}
	rec.Pkt.Data[15] = source
	add(r, rec, unsafe.Sizeof(*rec))
}

func (r *recorder) device(typ bpf.NftraceRecType, d bpf.NftraceDev) {
	rec := &bpf.NftraceRecDev{Hdr: r.header(typ, 0), Dev: d}
	add(r, rec, unsafe.Sizeof(*rec))
}
