package trace

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/nftrace/nftrace/bpf"
)

const nftModule = "nf_tables"

// nftProgram is the probe of __nft_trace_packet: see bpf/compat.h for how its arguments
// changed.
func nftProgram(types *btf.Cache) (string, error) {
	const name = "__nft_trace_packet"
	spec, err := types.Module(nftModule)
	if err != nil {
		return "", fmt.Errorf("read the type information of module %s: %w", nftModule, err)
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
func nftOffsets(types *btf.Cache) (lock, seq uint32, err error) {
	spec, err := types.Module(nftModule)
	if err != nil {
		return 0, 0, fmt.Errorf("read the type information of module %s: %w", nftModule, err)
	}
	var pernet, mutex *btf.Struct
	if err := spec.TypeByName("nftables_pernet", &pernet); err != nil {
		return 0, 0, fmt.Errorf("type information of module %s: %w", nftModule, err)
	}
	kernel, err := types.Kernel()
	if err == nil {
		err = kernel.TypeByName("mutex", &mutex)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("type information of the kernel: struct mutex: %w", err)
	}
	at, err1 := offsetOf(pernet, "commit_mutex")
	owner, err2 := offsetOf(mutex, "owner")
	seq, _ = offsetOf(pernet, "base_seq")
	return at + owner, seq, errors.Join(err1, err2)
}

// NFTIdle tells whether nobody changes nf_tables in the network namespace that the calling
// thread is in. It is not known (false) where the kernel's lock cannot be read.
func (t *Tracer) NFTIdle() (bool, error) {
	if t.nftState == nil {
		return false, errors.New("nf_tables was not there when nftrace looked")
	}
	if code, err := t.nftState.Run(nil); err != nil || code != 0 {
		return false, fmt.Errorf("read the lock of nf_tables: %d, %w", code, err)
	}
	var busy uint32
	err := t.vars[bpf.NftraceVarNftBusy].Get(&busy)
	return busy == 1, err
}

// startNFT lets nf_tables tell, once its probe is attached.
func (t *Tracer) startNFT(types *btf.Cache, probe, state *ebpf.Program) error {
	lock, seq, err := nftOffsets(types)
	if err != nil {
		return err
	}
	if err := errors.Join(t.vars[bpf.NftraceVarNftLock].Set(lock), t.vars[bpf.NftraceVarNftSeq].Set(seq)); err != nil {
		return err
	}
	t.nftState = state
	if err := t.maps[bpf.NftraceMapNftProgram].Put(uint32(0), probe); err != nil {
		return fmt.Errorf("let the probe of nf_tables find its counters: %w", err)
	}
	var s bpf.NftraceSymbols
	if err := t.vars[bpf.NftraceVarFoundSymbols].Get(&s); err != nil {
		return err
	}
	if err := t.vars[bpf.NftraceVarNftNetId].Set(s.NftId); err != nil {
		return err
	}
	if err := t.vars[bpf.NftraceVarNftOn].Set(uint32(1)); err != nil {
		return err
	}
	t.key, err = newNFTKey()
	return err
}
