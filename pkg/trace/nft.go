package trace

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/nftrace/nftrace/bpf"
)

const nftModule = "nf_tables"

// nftProgram is the probe of __nft_trace_packet: see bpf/compat.h for how its arguments
// changed.
func nftProgram(t *Tracer, types *btf.Cache) (string, error) {
	const name = "__nft_trace_packet"
	if t.unknown(nftModule) {
		return bpf.NftraceProgNftTraceInfo, nil
	}
	spec, err := t.modules.types(nftModule, types)
	if err != nil {
		return "", err
	}
	var f *btf.Func
	if err := spec.TypeByName(name, &f); err != nil {
		return "", fmt.Errorf("type information of module %s: %s: %w", nftModule, name, err)
	}
	proto, _ := f.Type.(*btf.FuncProto)
	switch {
	case proto == nil:
	case len(proto.Params) == 5:
		return bpf.NftraceProgNftTrace, nil
	case len(proto.Params) == 3:
		return bpf.NftraceProgNftTraceInfo, nil
	}
	return "", fmt.Errorf("%s of this kernel is unknown to nftrace (%v); please report it", name, f.Type)
}

// nftOffsets are those of commit_mutex.owner in struct nftables_pernet, and of base_seq, 0 if
// the kernel has that elsewhere.
func nftOffsets(spec, kernel *btf.Spec) (lock, seq uint32, err error) {
	var pernet, mutex *btf.Struct
	if err := spec.TypeByName("nftables_pernet", &pernet); err != nil {
		return 0, 0, fmt.Errorf("type information of module %s: %w", nftModule, err)
	}
	if err := kernel.TypeByName("mutex", &mutex); err != nil {
		return 0, 0, fmt.Errorf("type information of the kernel: struct mutex: %w", err)
	}
	at, err1 := offsetOf(pernet, "commit_mutex")
	owner, err2 := offsetOf(mutex, "owner")
	seq, _ = offsetOf(pernet, "base_seq")
	return at + owner, seq, errors.Join(err1, err2)
}

// flowLayout says where a flowtable's name is.
func flowLayout(spec *btf.Spec) (l bpf.NftraceFlowLayout, err error) {
	var flowtable, table *btf.Struct
	if err := errors.Join(spec.TypeByName("nft_flowtable", &flowtable), spec.TypeByName("nft_table", &table)); err != nil {
		return l, fmt.Errorf("type information of module %s: %w", nftModule, err)
	}
	data, err1 := offsetOf(flowtable, "data")
	name, err2 := offsetOf(flowtable, "name")
	of, err3 := offsetOf(flowtable, "table")
	l.Name, l.Table = int32(name)-int32(data), int32(of)-int32(data)
	var err4, err5 error
	l.TableName, err4 = offsetOf(table, "name")
	l.TableFamily, err5 = offsetOf(table, "family")
	return l, errors.Join(err1, err2, err3, err4, err5)
}

// HashesFlows tells whether the kernel, now that nf_tables tells of its rules, computes the flow hash of each
// packet that comes to one of its chains and has none yet (net/netfilter/nf_tables_trace.c:nft_trace_init; older
// ones do not). Kernels whose modules have no type information are too old for it.
func (t *Tracer) HashesFlows() bool { return t.hashes }

func hashesFlows(spec *btf.Spec) (bool, error) {
	var info *btf.Struct
	if err := spec.TypeByName("nft_traceinfo", &info); err != nil {
		return false, fmt.Errorf("type information of module %s: %w", nftModule, err)
	}
	return slices.ContainsFunc(info.Members, func(m btf.Member) bool { return m.Name == "skbid" }), nil
}

// NFTIdle tells whether nobody changes nf_tables in the network namespace that the calling
// thread is in. It is not known (false) where the kernel's lock cannot be read.
func (t *Tracer) NFTIdle() (bool, error) {
	if t.nftState == nil {
		return false, errors.New("nf_tables was not there when nftrace looked")
	}
	if err := ran(t.nftState.Run(nil)); err != nil {
		return false, fmt.Errorf("read the lock of nf_tables: %w", err)
	}
	var busy uint32
	err := t.vars[bpf.NftraceVarNftBusy].Get(&busy)
	return busy == 1, err
}

// startNFT lets nf_tables tell, once its probe is attached.
func (t *Tracer) startNFT(types *btf.Cache, programs map[string]*ebpf.Program, program string) error {
	var s bpf.NftraceSymbols
	if err := t.vars[bpf.NftraceVarFoundSymbols].Get(&s); err != nil {
		return err
	}
	if err := t.vars[bpf.NftraceVarNftNetId].Set(s.NftId); err != nil {
		return err
	}
	// The first one last: with it the probe looks for all.
	for i := copies[program]; i >= 0; i-- {
		name := program
		if i > 0 {
			name = copyName(program, i)
		}
		if programs[name] == nil {
			continue
		}
		if err := t.maps[bpf.NftraceMapNftProgram].Put(uint32(i), programs[name]); err != nil {
			return fmt.Errorf("let the probe of nf_tables find its counters: %w", err)
		}
	}
	t.nftState = programs[bpf.NftraceProgNftState]
	if t.unknown(nftModule) {
		look := programs[bpf.NftraceKprobeProgNftLook]
		err := t.turnNFTOn(func(k *nftKey) error { return t.learnNFT(k, look) })
		if errors.Is(err, errUnknownNFT) {
			t.untraced = append(t.untraced, untraced{nftModule, fmt.Sprintf("nf_tables is not traced on this kernel: %v", errUnknownNFT)})
			return t.vars[bpf.NftraceVarNftOn].Set(uint32(0))
		}
		return err
	}
	spec, err := t.modules.types(nftModule, types)
	if err != nil {
		return err
	}
	kernel, err := types.Kernel()
	if err != nil {
		return fmt.Errorf("read the type information of the kernel: %w", err)
	}
	lock, seq, err := nftOffsets(spec, kernel)
	if err != nil {
		return err
	}
	flow, err := flowLayout(spec)
	if err != nil {
		return err
	}
	if t.hashes, err = hashesFlows(spec); err != nil {
		return err
	}
	if err := t.setVars(map[string]any{
		bpf.NftraceVarNftLock: lock, bpf.NftraceVarNftSeq: seq, bpf.NftraceVarFlow: flow,
	}); err != nil {
		return err
	}
	return t.turnNFTOn(nil)
}

// turnNFTOn makes the key. learn, if not nil, is called in its namespace.
func (t *Tracer) turnNFTOn(learn func(*nftKey) error) (err error) {
	if err := t.vars[bpf.NftraceVarNftOn].Set(uint32(1)); err != nil {
		return err
	}
	t.key, err = newNFTKey(learn)
	return err
}
