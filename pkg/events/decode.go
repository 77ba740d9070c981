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

// recHook, recDev … return the typed record. Of the last member of rec_hook and of
// rec_table only so much is sent as is used.
func recHook(raw []byte, whole bool) (*bpf.NftraceRecHook, error) {
	var r bpf.NftraceRecHook
	if whole {
		return view[bpf.NftraceRecHook](raw, unsafe.Sizeof(r))
	}
	return view[bpf.NftraceRecHook](raw, unsafe.Offsetof(r.Pkt))
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

func recTable(raw []byte) (*bpf.NftraceRecTable, error) {
	var r bpf.NftraceRecTable
	t, err := view[bpf.NftraceRecTable](raw, unsafe.Offsetof(r.Hits))
	if err != nil {
		return nil, err
	}
	if int(t.Nhits) > len(t.Hits) {
		return nil, fmt.Errorf("record names %d rules, at most %d fit", t.Nhits, len(t.Hits))
	}
	_, err = view[bpf.NftraceRecTable](raw, unsafe.Offsetof(r.Hits)+uintptr(t.Nhits)*unsafe.Sizeof(r.Hits[0]))
	return t, err
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

// knownTable is the name of a table as records have it, in words that are compared at
// once, and as a string.
type knownTable struct {
	raw  [4]uint64
	name string
}

// tableName is the name of a table; there are few.
func (a *Assembler) tableName(name *[32]int8) string {
	raw := *(*[4]uint64)(unsafe.Pointer(name))
	for i := range a.tables {
		if k := &a.tables[i]; k.raw == raw {
			return k.name
		}
	}
	k := knownTable{raw: raw, name: string(cBytes(name[:]))}
	a.tables = append(a.tables, k)
	return k.name
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
