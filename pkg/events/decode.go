package events

import (
	"bytes"
	"fmt"
	"time"
	"unsafe"

	"github.com/nftrace/nftrace/bpf"
)

// header returns the header of a record.
func header(raw []byte) (*bpf.NftraceRecHdr, error) {
	if uintptr(len(raw)) < unsafe.Sizeof(bpf.NftraceRecHdr{}) {
		return nil, tooShort(raw, unsafe.Sizeof(bpf.NftraceRecHdr{}))
	}
	return (*bpf.NftraceRecHdr)(unsafe.Pointer(unsafe.SliceData(raw))), nil
}

// view lays T over the first bytes of a record, of which at least min must be there.
// The ring buffer aligns records to 8 bytes.
func view[T any](raw []byte, min uintptr) (*T, error) {
	if uintptr(len(raw)) < min {
		return nil, tooShort(raw, min)
	}
	return (*T)(unsafe.Pointer(unsafe.SliceData(raw))), nil
}

func tooShort(raw []byte, min uintptr) error {
	return fmt.Errorf("record of %d bytes, want at least %d", len(raw), min)
}

// recHook returns a record of a hook and those of its hits that were sent. Of rec_hook
// only so much is sent as is used: hasBefore and hasTables tell how much.
func recHook(raw []byte) (r *bpf.NftraceRecHook, hits []bpf.NftraceHit, hasBefore, hasTables bool, err error) {
	if r, err = view[bpf.NftraceRecHook](raw, hookBefore); err != nil {
		return nil, nil, false, false, err
	}
	if r.Ntables == 0 {
		return r, nil, uintptr(len(raw)) >= hookNhits, false, nil
	}
	if int(r.Ntables) > len(r.Tables) {
		return nil, nil, false, false, fmt.Errorf("record names %d tables, at most %d fit", r.Ntables, len(r.Tables))
	}
	if uintptr(len(raw)) < hookHits {
		return nil, nil, false, false, tooShort(raw, hookHits)
	}
	if int(r.Nhits) > len(r.Hits) {
		return nil, nil, false, false, fmt.Errorf("record names %d rules, at most %d fit", r.Nhits, len(r.Hits))
	}
	if min := hookHits + uintptr(r.Nhits)*hitSize; uintptr(len(raw)) < min {
		return nil, nil, false, false, tooShort(raw, min)
	}
	return r, r.Hits[:r.Nhits], true, true, nil
}

// recDev … return the typed record.
func recDev(raw []byte) (*bpf.NftraceRecDev, error) {
	return view[bpf.NftraceRecDev](raw, unsafe.Sizeof(bpf.NftraceRecDev{}))
}

func recNAT(raw []byte) (*bpf.NftraceRecNat, error) {
	return view[bpf.NftraceRecNat](raw, unsafe.Sizeof(bpf.NftraceRecNat{}))
}

// recNFT returns a copy: the names are not there but in the first record of a run.
func recNFT(raw []byte) (r bpf.NftraceRecNft, err error) {
	if min := unsafe.Offsetof(r.Name); uintptr(len(raw)) < min {
		return r, tooShort(raw, min)
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&r)), unsafe.Sizeof(r)), raw)
	return r, nil
}

func recFlow(raw []byte) (*bpf.NftraceRecFlow, error) {
	return view[bpf.NftraceRecFlow](raw, unsafe.Sizeof(bpf.NftraceRecFlow{}))
}

// ebtRecord is a record of ebtables, whose hits are the table's.
type ebtRecord struct {
	ts, private, gen uint64
	flags            uint32
	cpu              uint16
	hook, verdict    uint8
	name             string
	hits             []Hit
}

func recEBT(raw []byte) (*ebtRecord, error) {
	r, err := view[bpf.NftraceRecEbt](raw, ebtHits)
	if err != nil {
		return nil, err
	}
	if int(r.Nhits) > len(r.Hits) {
		return nil, fmt.Errorf("record names %d rules, at most %d fit", r.Nhits, len(r.Hits))
	}
	if min := ebtHits + uintptr(r.Nhits)*hitSize; uintptr(len(raw)) < min {
		return nil, tooShort(raw, min)
	}
	return &ebtRecord{
		ts: r.Hdr.Ts, flags: r.Hdr.Flags, cpu: r.Hdr.Cpu, private: r.Private, gen: r.Gen,
		hook: r.Hook, verdict: r.Verdict, name: string(cBytes(r.Name[:])), hits: hitsOf(r.Hits[:r.Nhits], 0),
	}, nil
}

func recPkt(raw []byte) (*bpf.NftraceRecPkt, error) {
	return view[bpf.NftraceRecPkt](raw, unsafe.Sizeof(bpf.NftraceRecPkt{}))
}

// cBytes are the bytes before the first NUL.
func cBytes[T ~int8 | ~uint8](s []T) []byte {
	b := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(s))), len(s))
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return b
}

// maxNames is how many names of devices are kept.
const maxNames = 1 << 14

// knownDevice is a device as records have it, and what was made of it.
type knownDevice struct {
	netns uint32
	raw   bpf.NftraceDev
	dev   Device
	// in and out are places that have this device and nothing else.
	in, out *Place
}

// knownAt is where a device is kept until another takes its place.
func (a *Assembler) knownAt(netns, index uint32) *knownDevice {
	return &a.devices[(netns*31+index)%uint32(len(a.devices))]
}

// known is what is known of a device, or of none. A few are in nearly all records: those
// are compared only. It makes no new string for a name that it knows, and learns those
// that it does not.
func (a *Assembler) known(netns uint32, d *bpf.NftraceDev) *knownDevice {
	k := a.knownAt(netns, d.Ifindex)
	if k.in != nil && k.netns == netns && k.raw == *d {
		return k
	}
	var dev Device
	if d.Ifindex != 0 {
		key := ifaceKey{netns, int(d.Ifindex)}
		name := cBytes(d.Name[:])
		known, ok := a.names[key]
		if !ok || known != string(name) {
			if ok {
				a.renamed++
			}
			a.named++
			if len(a.names) >= maxNames { // of namespaces that are gone, most of them
				clear(a.names)
				clear(a.devices[:])
				a.renamed++
			}
			known = string(name)
			a.names[key] = known
		}
		dev = Device{Index: key.index, Name: known}
	}
	*k = knownDevice{
		netns: netns, raw: *d, dev: dev,
		in: &Place{Netns: netns, In: dev}, out: &Place{Netns: netns, Out: dev},
	}
	return k
}

func (a *Assembler) device(netns uint32, d *bpf.NftraceDev) Device {
	return a.known(netns, d).dev
}

// name gives a bridge port the name that it was recorded with last.
func (a *Assembler) name(p *Place) {
	if p.named != a.named {
		p.named = a.named
		p.PhysIn.Name = a.names[ifaceKey{p.Netns, p.PhysIn.Index}]
	}
}

// unnamed tells whether the name of a bridge port is not known.
func (p *Place) unnamed() bool { return p.PhysIn.Index != 0 && p.PhysIn.Name == "" }

// askName gives a bridge port that no record names the name that it has now.
func (a *Assembler) askName(p *Place) {
	key := ifaceKey{p.Netns, p.PhysIn.Index}
	if a.names[key] == "" {
		if name := a.PortName(key.netns, key.index); name != "" {
			a.names[key] = name
		}
	}
	p.PhysIn.Name = a.names[key]
}

// enum ip_conntrack_info (include/uapi/linux/netfilter/nf_conntrack_common.h).
var ctStates = [8]struct {
	state string
	reply bool
}{
	0: {"ESTABLISHED", false},
	1: {"RELATED", false},
	2: {"NEW", false},
	3: {"ESTABLISHED", true},
	4: {"RELATED", true},
	7: {"UNTRACKED", false},
}

// readPacket reads a packet, of whose bytes it keeps slices.
func readPacket(to *Packet, p *bpf.NftracePkt) {
	*to = Packet{}
	to.EtherType, to.Len = p.Ethertype, int(p.Len)
	n := min(int(p.Cap), len(p.Data))
	to.Data = p.Data[:n:n]
	to.MACDevType, to.Mark, to.VLAN = p.DevType, p.Mark, int(p.Vlan)-1
	switch p.Ethertype {
	case 0x0800:
		to.Family = PFIPv4
	case 0x86dd:
		to.Family = PFIPv6
	}
	if n := min(int(p.MacLen), len(p.Mac)); n > 0 {
		to.MAC = p.Mac[:n:n]
	}
	if p.Flags&uint8(bpf.NftracePktFlagPKT_F_OWNER) != 0 {
		to.HasOwner, to.UID, to.GID = true, p.Uid, p.Gid
	}
	if p.Flags&uint8(bpf.NftracePktFlagPKT_F_CT) != 0 {
		ct := &ctStates[p.Ctinfo&7]
		to.CT, to.CTReply = ct.state, ct.reply
	}
	to.HasCTMark = p.Flags&uint8(bpf.NftracePktFlagPKT_F_CTMARK) != 0
	to.CTConfirmed = p.Flags&uint8(bpf.NftracePktFlagPKT_F_CONFIRMED) != 0
	to.CTMark = p.CtMark
}

func ns(t uint64) time.Duration { return time.Duration(t) }
