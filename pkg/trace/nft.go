package trace

import (
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

// startNFT lets nf_tables tell, once its probe is attached.
func (t *Tracer) startNFT(probe *ebpf.Program) error {
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
	var err error
	t.key, err = newNFTKey()
	return err
}
