package trace

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/bpf"
)

// The kernel's own functions are probed by one backend, for what probes of hooks, devices and a
// packet's end tell must not be from two that miss different calls. Those of a module can be
// probed by the other one: what may be missed then, the probe of the hooks tells (some_kprobes).

// Probes says which functions are probed by which backend, and why. It may be another answer once
// AttachModules has been called.
func (t *Tracer) Probes() string {
	switch {
	case t.missing != "":
		return "all probes are kprobes, for the kernel lacks " + t.missing
	case t.backend == Kprobe:
		return "all probes are kprobes"
	case len(t.kprobes) == 0:
		return "all probes are fentry probes"
	}
	return "all probes are fentry probes, but for " + strings.Join(t.kprobes, "; ")
}

// split tells which of some groups one backend cannot probe, since their modules are without type
// information, and notes why; and it leaves out what nobody can probe without.
func (t *Tracer) split(gs []group) (own, kprobes []group, err error) {
	for _, g := range gs {
		switch lacks := t.modules.lacksTypes(g.module); {
		case lacks == "":
			own = append(own, g)
		case t.backend == Fentry && !t.auto:
			return nil, nil, fmt.Errorf("%s, which fentry probes need; leave out --backend fentry, or load a module that has it", lacks)
		case g.typed && !t.byHand:
			if g.untraced != "" {
				t.untraced = append(t.untraced, untraced{g.module, fmt.Sprintf("%s: %s; load a module that has it", g.untraced, lacks)})
			}
		case t.backend == Fentry:
			kprobes = append(kprobes, g)
			t.noteKprobes(g, lacks)
		default:
			own = append(own, g)
		}
	}
	return own, kprobes, nil
}

func (t *Tracer) noteKprobes(g group, why string) {
	t.kprobes = append(t.kprobes, fmt.Sprintf("kprobes at %s, since %s", strings.Join(functionsOf(t.spec, g), ", "), why))
}

// functionsOf are those that the probes of some groups are attached to.
func functionsOf(spec *ebpf.CollectionSpec, gs ...group) []string {
	var functions []string
	for _, g := range gs {
		for _, name := range g.programs {
			if p := spec.Programs[name]; p != nil && p.Type == ebpf.Tracing && p.AttachType != ebpf.AttachTraceRawTp {
				functions = append(functions, p.AttachTo)
			}
		}
	}
	slices.Sort(functions)
	return slices.Compact(functions)
}

// splitRefused asks which of some groups have functions of modules that take no fentry probe.
func (t *Tracer) splitRefused(gs []group, types *btf.Cache) (own, kprobes []group) {
	for _, g := range gs {
		why := ""
		if g.module != "" {
			why = refused(functionsOf(t.spec, g), types)
		}
		if why == "" {
			own = append(own, g)
			continue
		}
		kprobes = append(kprobes, g)
		t.noteKprobes(g, "the kernel lacks "+why)
	}
	return own, kprobes
}

// refusedByKernel names those of the kernel's own functions that take no fentry probe; "" if none.
func refusedByKernel() string {
	spec, err := bpf.LoadNftrace()
	if err != nil {
		return ""
	}
	var own []group
	for _, g := range groups {
		if g.module == "" && (g.present == nil || g.present()) {
			own = append(own, g)
		}
	}
	return refused(functionsOf(spec, own...), btf.NewCache())
}

// refused says that the kernel lacks places for fentry probes in some functions; "" if it does not.
func refused(functions []string, types *btf.Cache) string {
	var no []string
	for _, name := range functions {
		if takesNone(tryFentry(name, types)) {
			no = append(no, name)
		}
	}
	if len(no) == 0 {
		return ""
	}
	return "places for fentry probes in " + strings.Join(no, ", ")
}

// takesNone tells whether an error says something of the function, and not of whoever asks.
func takesNone(err error) bool {
	return err != nil && !errors.Is(err, os.ErrPermission) && !errors.Is(err, unix.ENOMEM) && !errors.Is(err, unix.E2BIG)
}

// tryFentry attaches a probe to a function that does nothing, and detaches it.
func tryFentry(function string, types *btf.Cache) error {
	coll, err := ebpf.NewCollectionWithOptions(&ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{
		function: {
			Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFEntry, AttachTo: function,
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
			License:      "GPL",
		},
	}}, ebpf.CollectionOptions{Cache: types})
	if err != nil {
		return err
	}
	defer coll.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: coll.Programs[function]})
	if err != nil {
		return err
	}
	return l.Close()
}

// mix makes kprobes possible beside fentry probes: they share all maps but their constants.
func (t *Tracer) mix() error {
	if t.kprobeSpec != nil {
		return nil
	}
	o := t.options
	o.Backend = Kprobe
	spec, err := loadSpec(o)
	if err != nil {
		return err
	}
	spec.Maps[bpf.NftraceMapXtTables] = t.spec.Maps[bpf.NftraceMapXtTables].Copy()
	shared := maps.Clone(t.maps)
	maps.DeleteFunc(shared, func(name string, _ *ebpf.Map) bool {
		return strings.HasPrefix(name, constants) || spec.Maps[name] == nil
	})
	coll, err := ebpf.NewCollectionWithOptions(&ebpf.CollectionSpec{
		Maps: spec.Maps, Variables: spec.Variables,
		Types: spec.Types, ByteOrder: spec.ByteOrder,
	}, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return loadError("create the maps of kprobes", err)
	}
	t.mu.Lock()
	t.colls = append(t.colls, coll)
	t.mu.Unlock()
	t.kprobeSpec, t.kprobeMaps = spec, coll.Maps
	if err := t.setSymbols(); err != nil {
		return err
	}
	return t.vars[bpf.NftraceVarSomeKprobes].Set(uint32(1))
}

// constants is what the names of maps begin with that programs cannot write.
const constants = ".rodata"
