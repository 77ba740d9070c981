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

// recHook, recDev … return the typed record. Of rec_hook only so much is sent as is
// used: hasBefore and hasTables tell how much.
func recHook(raw []byte) (r *bpf.NftraceRecHook, hasBefore, hasTables bool, err error) {
	var z bpf.NftraceRecHook
	r, err = view[bpf.NftraceRecHook](raw, unsafe.Offsetof(z.Before))
	if err != nil {
		return nil, false, false, err
	}
	switch {
	case int(r.Ntables) > len(r.Tables):
		return nil, false, false, fmt.Errorf("record names %d tables, at most %d fit", r.Ntables, len(r.Tables))
	case r.Ntables == 0:
		return r, uintptr(len(raw)) >= unsafe.Offsetof(z.Nhits), false, nil
	}
	if _, err = view[bpf.NftraceRecHook](raw, unsafe.Offsetof(z.Hits)); err != nil {
		return nil, false, false, err
	}
	if int(r.Nhits) > len(r.Hits) {
		return nil, false, false, fmt.Errorf("record names %d rules, at most %d fit", r.Nhits, len(r.Hits))
	}
	_, err = view[bpf.NftraceRecHook](raw, unsafe.Offsetof(z.Hits)+uintptr(r.Nhits)*unsafe.Sizeof(z.Hits[0]))
	if err != nil {
		return nil, false, false, err
	}
	for i := range r.Hits[:r.Nhits] {
		if n := r.Hits[i].Table; uint32(n) >= r.Ntables {
			return nil, false, false, fmt.Errorf("record names %d tables, but a rule of the %dth", r.Ntables, n+1)
		}
	}
	return r, true, true, nil
}

func recDev(raw []byte) (*bpf.NftraceRecDev, error) {
	return view[bpf.NftraceRecDev](raw, unsafe.Sizeof(bpf.NftraceRecDev{}))
}

func recNAT(raw []byte) (*bpf.NftraceRecNat, error) {
	return view[bpf.NftraceRecNat](raw, unsafe.Sizeof(bpf.NftraceRecNat{}))
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

// knownDevice is a device as records have it, and what was made of it.
type knownDevice struct {
	netns uint32
	raw   bpf.NftraceDev
	dev   Device
}

// knownAt is where a device is kept until another takes its place.
func (a *Assembler) knownAt(netns, index uint32) *knownDevice {
	return &a.devices[(netns*31+index)%uint32(len(a.devices))]
}

// device fills in a device, if there is one. A few are in nearly all records: those are
// compared only. It makes no new string for a name that it knows, and learns those that
// it does not.
func (a *Assembler) device(to *Device, netns uint32, d *bpf.NftraceDev) {
	if d.Ifindex == 0 {
		return
	}
	k := a.knownAt(netns, d.Ifindex)
	if k.netns != netns || k.raw != *d {
		key := ifaceKey{netns, int(d.Ifindex)}
		name := cBytes(d.Name[:])
		known, ok := a.names[key]
		if !ok || known != string(name) {
			known = string(name)
			a.names[key] = known
		}
		*k = knownDevice{netns: netns, raw: *d, dev: Device{Index: key.index, Name: known}}
	}
	*to = k.dev
}

// deviceName is the name of a device as it was recorded last.
func (a *Assembler) deviceName(netns uint32, index int) string {
	if k := a.knownAt(netns, uint32(index)); k.netns == netns && k.dev.Index == index {
		return k.dev.Name
	}
	return a.names[ifaceKey{netns, index}]
}

// knownTable is the name of a table as records have it, in a word that is compared at
// once, and what was made of it.
type knownTable struct {
	raw   uint64
	name  string
	ranks [2]uint8 // of which the second holds where table nat comes before filter
}

// table is what is known of the table of that name; there are few. It is valid until the
// next call.
func (a *Assembler) table(name *[8]int8) *knownTable {
	raw := *(*uint64)(unsafe.Pointer(name))
	for i := range a.tables {
		if k := &a.tables[i]; k.raw == raw {
			return k
		}
	}
	k := knownTable{raw: raw, name: string(cBytes(name[:]))}
	k.ranks = [2]uint8{rank(k.name, false), rank(k.name, true)}
	a.tables = append(a.tables, k)
	return &a.tables[len(a.tables)-1]
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
}

func ns(t uint64) time.Duration { return time.Duration(t) }
