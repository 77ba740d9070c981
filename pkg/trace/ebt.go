package trace

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/nftrace/nftrace/bpf"
)

const ebtModule = "ebtables"

// ebtTypes are the types of module ebtables.
func (t *Tracer) ebtTypes(types *btf.Cache) (*btf.Spec, error) {
	if t.unknown(ebtModule) {
		return handmadeTypes(ebtModule)
	}
	return t.modules.types(ebtModule, types)
}

// ebtProgram is the probe of ebt_do_table: see bpf/compat.h for its arguments.
func ebtProgram(t *Tracer, types *btf.Cache) (string, error) {
	const name = "ebt_do_table"
	if t.unknown(ebtModule) {
		return bpf.NftraceKprobeProgEbtBeginLast, nil
	}
	spec, err := t.ebtTypes(types)
	if err != nil {
		return "", err
	}
	var f *btf.Func
	if err := spec.TypeByName(name, &f); err != nil {
		return "", fmt.Errorf("type information of module %s: %s: %w", ebtModule, name, err)
	}
	if proto, _ := f.Type.(*btf.FuncProto); proto != nil && len(proto.Params) == 3 {
		if proto.Params[0].Name == "skb" {
			return bpf.NftraceKprobeProgEbtBeginLast, nil
		}
		return bpf.NftraceProgEbtBegin, nil
	}
	return "", fmt.Errorf("%s of this kernel is unknown to nftrace (%v); please report it", name, f.Type)
}

// startEBT lets the probes of ebtables tell, once they are attached.
func (t *Tracer) startEBT(types *btf.Cache, programs map[string]*ebpf.Program) error {
	spec, err := t.ebtTypes(types)
	if err != nil {
		return err
	}
	var table *btf.Struct
	if err := spec.TypeByName("ebt_table", &table); err != nil {
		return fmt.Errorf("type information of module %s: %w", ebtModule, err)
	}
	list, err1 := offsetOf(table, "list")
	name, err2 := offsetOf(table, "name")
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	var s bpf.NftraceSymbols
	if err := t.vars[bpf.NftraceVarFoundSymbols].Get(&s); err != nil {
		return err
	}
	if list == 0 && (s.EbtPernetId != 0 || tablesInNet(types)) {
		t.ebtList = programs[bpf.NftraceProgEbtList]
	}
	return t.setVars(map[string]any{
		bpf.NftraceVarEbtName: name, bpf.NftraceVarEbtNetId: s.EbtId, bpf.NftraceVarEbtOn: uint32(1),
	})
}

// EBTNames returns the names of the tables of ebtables that the network namespace has which the
// calling thread is in. It reads them in the kernel's memory: nothing comes to be by that, as
// it would if ebtables were asked for a table that is not there.
func (t *Tracer) EBTNames() ([]string, error) {
	if t.ebtList == nil {
		return nil, nil // no tables, or nobody knows where they are
	}
	if err := ran(t.ebtList.Run(nil)); err != nil {
		return nil, fmt.Errorf("look for the tables of ebtables: %w", err)
	}
	var found bpf.NftraceEbtNames
	if err := t.vars[bpf.NftraceVarEbtNames].Get(&found); err != nil {
		return nil, err
	}
	var names []string
	for _, n := range found.Name[:min(int(found.N), len(found.Name))] {
		names = append(names, cString(n[:]))
	}
	return names, nil
}
