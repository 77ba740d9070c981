package trace

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/bpf"
	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/filter"
)

// filterFunc is the function of the probes that filter expressions replace.
const filterFunc = "filter_expr"

// Iface is an interface of a network namespace (by the namespace's inode number).
type Iface struct {
	Netns uint32
	Index uint32
}

// Options says what to trace. The zero value traces every packet.
type Options struct {
	// Filter is the compiled filter expression: a function that takes a
	// pointer to struct pkt_tuple in R1 and returns 0 or 1. nil: everything.
	Filter asm.Instructions
	// Netns, Ifaces and Addrs limit tracing to packets that are seen in one of these
	// namespaces, at one of these interfaces, or with one of these addresses as
	// source or destination. All empty: everywhere.
	Netns  []uint32
	Ifaces []Iface
	Addrs  []netip.Addr
	// MaxRules is the number of rules, policies included, for which room is made in
	// all tables of a namespace and family together; 0 means 1,024.
	MaxRules int
	// SourceLines keeps the lines of source that the verifier's log quotes; loading the
	// probes takes longer.
	SourceLines bool
	// BufferBytes is the size of the ring buffer, a power of two and a multiple
	// of the page size; 0 means 8 MiB.
	BufferBytes int
}

// group is a set of probes whose functions are in one module (or in vmlinux), which
// are loaded and attached together.
type group struct {
	module   string // "" for vmlinux
	programs []string
	// present, if set, tells whether the kernel has the functions, or needs the probes.
	present func() bool
	// choose, if set, returns one more: the one that fits the kernel's function.
	choose func(*btf.Cache) (string, error)
}

var groups = []group{
	{module: "x_tables", programs: []string{bpf.NftraceProgTableFree, bpf.NftraceProgTableLookup, bpf.NftraceProgTableReplaced}},
	{module: "bridge", programs: []string{bpf.NftraceProgBrForward}},
	{module: "nf_defrag_ipv6", programs: []string{bpf.NftraceProgDefragIp6}},
	{module: "nf_nat", programs: []string{bpf.NftraceProgNat, bpf.NftraceProgNatIcmp, bpf.NftraceProgNatIcmp6}},
	{module: nftModule, programs: []string{bpf.NftraceProgNftCommit, bpf.NftraceProgNftCommitted, bpf.NftraceProgNftState}, choose: nftProgram},
	{programs: []string{bpf.NftraceProgDeliverIp6}, present: hasIPv6},
	{programs: []string{
		bpf.NftraceProgSkbRelease, bpf.NftraceProgSkbMorph, bpf.NftraceProgSkbDrop, bpf.NftraceProgDefragIp,
		bpf.NftraceProgDevXmit, bpf.NftraceProgDeliverIp,
		bpf.NftraceProgSoftirqExit, bpf.NftraceProgSchedSwitch,
		bpf.NftraceProgHookEnter,
	}},
	{programs: []string{bpf.NftraceProgHookEnterTask, bpf.NftraceProgHookEnterSoftirq}, present: useTaskProbe},
}

// useTaskProbe tells whether tasks and softirqs have a probe of the hooks each, so that
// softirqs do not hit one that runs: where tasks preempt each other, and where there is one
// CPU for all, whose counters take long to copy. Then hook_enter is not attached; these
// two jump to it.
func useTaskProbe() bool {
	cpus, err := ebpf.PossibleCPU()
	return tasksPreempt() || err == nil && cpus == 1
}

// waitFor are the modules of which nftrace tells people that it waits for them.
var waitFor = []string{"ip_tables", "ip6_tables", nftModule}

// Tracer is a set of attached probes. Its methods are to be called from one goroutine, but
// for Close, Stop, ReadTable, and Lookup, which is for one at a time.
type Tracer struct {
	spec *ebpf.CollectionSpec
	maps map[string]*ebpf.Map
	vars map[string]*ebpf.Variable
	ring *ring
	news *ring   // see ReadTable
	key  *nftKey // nil: nf_tables is not there

	nftState *ebpf.Program // see NFTIdle

	mu      sync.Mutex
	colls   []*ebpf.Collection
	links   map[string]link.Link // by program
	pending []group              // of modules that are not loaded
	waiting []string             // see Waiting
}

// Open loads the probes into the kernel and attaches them. Probes in modules that
// are not loaded wait: see Waiting and AttachModules.
func Open(o Options) (*Tracer, error) {
	if err := CheckKernel(); err != nil {
		return nil, err
	}
	spec, err := bpf.LoadNftrace()
	if err != nil {
		return nil, fmt.Errorf("parse the probes: %w", err)
	}
	if err := configure(spec, o); err != nil {
		return nil, err
	}
	t := &Tracer{spec: spec, links: map[string]link.Link{}}
	if err := t.start(o); err != nil {
		t.Close()
		return nil, explain(err)
	}
	return t, nil
}

// configure sets the constants and the sizes of the maps.
func configure(spec *ebpf.CollectionSpec, o Options) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count the CPUs: %w", err)
	}
	maxRules := o.MaxRules
	if maxRules == 0 {
		maxRules = 1024
	}
	const block = uint32(len(bpf.NftraceBlock{}.C))
	const tables = uint32(len(bpf.NftraceFrame{}.Tables))
	blocks := (uint32(maxRules)+block-1)/block + tables

	frames := uint32(cpus) * uint32(bpf.NftraceLimitsFRAMES)
	spec.Maps[bpf.NftraceMapFrames].MaxEntries = frames
	spec.Maps[bpf.NftraceMapXtSnap].MaxEntries = frames*blocks + uint32(cpus)*uint32(bpf.NftraceLimitsKEPT)
	spec.Maps[bpf.NftraceMapCpus].MaxEntries = uint32(cpus)
	if o.BufferBytes != 0 {
		spec.Maps[bpf.NftraceMapRecords].MaxEntries = uint32(o.BufferBytes)
	}

	for name, value := range map[string]any{
		bpf.NftraceVarUseTaskProbe: useTaskProbe(),
		bpf.NftraceVarTasksPreempt: tasksPreempt(),
		bpf.NftraceVarWakeBytes:    uint64(spec.Maps[bpf.NftraceMapRecords].MaxEntries) / 4,
		bpf.NftraceVarNrCpus:       uint32(cpus),
		bpf.NftraceVarSnapBlocks:   blocks,
		bpf.NftraceVarUseFilter:    len(o.Netns)+len(o.Ifaces)+len(o.Addrs)+len(o.Filter) > 0,
		bpf.NftraceVarUsePlaces:    len(o.Netns)+len(o.Ifaces)+len(o.Addrs) > 0,
		bpf.NftraceVarUseNetns:     len(o.Netns) > 0,
		bpf.NftraceVarUseIfaces:    len(o.Ifaces) > 0,
		bpf.NftraceVarIfaceBits:    ifaceBits(o.Ifaces),
		bpf.NftraceVarUseAddrs:     len(o.Addrs) > 0,
		bpf.NftraceVarUseExpr:      len(o.Filter) > 0,
		bpf.NftraceVarUseNat:       looksAtEndpoints(o.Filter),
		bpf.NftraceVarUseDetail:    looksAtDetail(o.Filter),
		bpf.NftraceVarUseMac:       looksAtMAC(o.Filter),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	if !o.SourceLines {
		for _, p := range spec.Programs {
			dropLines(p.Instructions)
		}
	}
	if tasksPreempt() {
		makeStatic(spec.Programs[bpf.NftraceProgHookEnter].Instructions)
	}
	if len(o.Filter) == 0 {
		return nil
	}
	for _, p := range spec.Programs {
		if !hasSymbol(p.Instructions, filterFunc) {
			continue
		}
		if p.Instructions, err = filter.Replace(p.Instructions, filterFunc, o.Filter); err != nil {
			return err
		}
	}
	return nil
}

// dropLines drops the lines of source but for the first of each function, which the kernel
// wants if there are any.
func dropLines(insns asm.Instructions) {
	for i := range insns {
		if btf.FuncMetadata(&insns[i]) == nil {
			insns[i] = insns[i].WithSource(nil)
		}
	}
}

// makeStatic makes a program's functions static: no others can be called with preemption off.
func makeStatic(insns asm.Instructions) {
	for i := range insns {
		if f := btf.FuncMetadata(&insns[i]); f != nil && i > 0 {
			static := *f
			static.Linkage = btf.StaticFunc
			insns[i] = btf.WithFuncMetadata(insns[i], &static)
		}
	}
}

// ifaceBits has a bit for each interface: index modulo 64.
func ifaceBits(ifaces []Iface) (bits uint64) {
	for _, i := range ifaces {
		bits |= 1 << (i.Index % 64)
	}
	return bits
}

func hasSymbol(insns asm.Instructions, name string) bool {
	return slices.ContainsFunc(insns, func(i asm.Instruction) bool { return i.Symbol() == name })
}

// looksAtEndpoints tells whether a filter looks at addresses or ports, which NAT may
// change: a packet that it does not match may match later.
func looksAtEndpoints(insns asm.Instructions) bool {
	var t filter.Tuple
	return loads(insns, unsafe.Offsetof(t.SAddr), unsafe.Sizeof(t.SAddr)) ||
		loads(insns, unsafe.Offsetof(t.DAddr), unsafe.Sizeof(t.DAddr)) ||
		loads(insns, unsafe.Offsetof(t.SPort), unsafe.Sizeof(t.SPort)) ||
		loads(insns, unsafe.Offsetof(t.DPort), unsafe.Sizeof(t.DPort))
}

// looksAtDetail tells whether a filter looks at what differs between packets of one flow.
func looksAtDetail(insns asm.Instructions) bool {
	var t filter.Tuple
	return loads(insns, unsafe.Offsetof(t.Len), unsafe.Sizeof(t.Len)) ||
		looksAtMAC(insns) ||
		loads(insns, unsafe.Offsetof(t.TCPFlags), unsafe.Sizeof(t.TCPFlags)) ||
		loads(insns, unsafe.Offsetof(t.ICMPType), unsafe.Sizeof(t.ICMPType)) ||
		loads(insns, unsafe.Offsetof(t.ICMPCode), unsafe.Sizeof(t.ICMPCode))
}

// looksAtMAC tells whether a filter looks at Ethernet addresses, which cost a read.
func looksAtMAC(insns asm.Instructions) bool {
	var t filter.Tuple
	return loads(insns, unsafe.Offsetof(t.SMAC), unsafe.Sizeof(t.SMAC)) ||
		loads(insns, unsafe.Offsetof(t.DMAC), unsafe.Sizeof(t.DMAC))
}

// loads tells whether a filter loads anything from some bytes of the tuple.
func loads(insns asm.Instructions, off, size uintptr) bool {
	return slices.ContainsFunc(insns, func(ins asm.Instruction) bool {
		at := uintptr(ins.Offset)
		return ins.OpCode.Class() == asm.LdXClass && ins.Src == asm.R1 && at >= off && at < off+size
	})
}

// start loads and attaches. What it made is closed by Close if it fails.
func (t *Tracer) start(o Options) error {
	maps := &ebpf.CollectionSpec{
		Maps: t.spec.Maps, Variables: t.spec.Variables,
		Types: t.spec.Types, ByteOrder: t.spec.ByteOrder,
	}
	coll, err := ebpf.NewCollection(maps)
	if err != nil {
		return loadError("create the maps", err)
	}
	t.colls = append(t.colls, coll)
	t.maps, t.vars = coll.Maps, coll.Variables
	one := uint8(1)
	for _, ns := range o.Netns {
		if err := t.maps[bpf.NftraceMapFilterNetns].Put(ns, one); err != nil {
			return fmt.Errorf("more namespaces than the filter has room for: %w", err)
		}
	}
	for _, i := range o.Ifaces {
		key := bpf.NftraceIface{Netns: i.Netns, Ifindex: i.Index}
		if err := t.maps[bpf.NftraceMapFilterIfaces].Put(key, one); err != nil {
			return fmt.Errorf("more interfaces than the filter has room for: %w", err)
		}
	}
	for _, a := range o.Addrs {
		var key bpf.NftraceAddr
		copy(key.B[:], a.AsSlice())
		if err := t.maps[bpf.NftraceMapFilterAddrs].Put(key, one); err != nil {
			return fmt.Errorf("more addresses than the filter has room for: %w", err)
		}
	}
	if t.ring, err = newRing(t.maps[bpf.NftraceMapRecords]); err != nil {
		return fmt.Errorf("read the ring buffer: %w", err)
	}
	if t.news, err = newRing(t.maps[bpf.NftraceMapNewTables]); err != nil {
		return fmt.Errorf("read the news of tables: %w", err)
	}
	if err := t.setSymbols(); err != nil {
		return err
	}
	t.waiting = slices.DeleteFunc(slices.Clone(waitFor), moduleLoaded)
	var ready []group
	for _, g := range groups {
		if g.present != nil && !g.present() {
			continue
		}
		if g.module != "" && !moduleLoaded(g.module) {
			t.pending = append(t.pending, g)
			continue
		}
		ready = append(ready, g)
	}
	if err := t.attach(ready); err != nil {
		return err
	}
	// Whatever becomes of a packet, a probe is there to see it.
	return t.vars[bpf.NftraceVarTracing].Set(uint64(1))
}

// attach loads and attaches the probes of some groups, in their order. They are loaded
// together, because reading the kernel's type information takes most of the time.
func (t *Tracer) attach(gs []group) error {
	sub := &ebpf.CollectionSpec{
		Maps: t.spec.Maps, Variables: t.spec.Variables,
		Types: t.spec.Types, ByteOrder: t.spec.ByteOrder,
		Programs: map[string]*ebpf.ProgramSpec{},
	}
	// Not for longer: it would not know the modules that are loaded later.
	types := btf.NewCache()
	preempt := tasksPreempt()
	for i := range gs {
		g := &gs[i]
		if g.choose != nil {
			name, err := g.choose(types)
			if err != nil {
				return err
			}
			g.programs = append(slices.Clone(g.programs), name)
		}
		for _, name := range g.programs {
			sub.Programs[name] = t.spec.Programs[name]
			for i := range copies[name] {
				if preempt {
					sub.Programs[fmt.Sprintf("%s_%d", name, i+1)] = t.spec.Programs[name].Copy()
				}
			}
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(sub, ebpf.CollectionOptions{MapReplacements: t.maps, Cache: types})
	if err != nil {
		return loadError("load the probes", err)
	}
	t.colls = append(t.colls, coll)
	if hook := coll.Programs[bpf.NftraceProgHookEnter]; hook != nil && useTaskProbe() {
		if err := t.maps[bpf.NftraceMapHookProgram].Put(uint32(0), hook); err != nil {
			return fmt.Errorf("let probes jump to %s: %w", bpf.NftraceProgHookEnter, err)
		}
		delete(sub.Programs, bpf.NftraceProgHookEnter)
	}
	delete(sub.Programs, bpf.NftraceProgNftState) // which NFTIdle runs
	if err := t.link(coll, sub.Programs); err != nil {
		return err
	}
	for _, g := range gs {
		var err error
		switch g.module {
		case "x_tables":
			err = t.setLayout(types)
		case nftModule:
			err = t.startNFT(types, coll.Programs[g.programs[len(g.programs)-1]], coll.Programs[bpf.NftraceProgNftState])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// copies is how many more of a program are attached where tasks preempt each other; the
// first one that the kernel does not skip does the work. A task that is preempted at the
// edge of a probe keeps the kernel from running that one again, so one CPU with many tasks
// wants more; and a softirq may come while a task finds out that hook_enter_softirq is not for it.
var copies = map[string]int{bpf.NftraceProgHookEnterSoftirq: 1, bpf.NftraceProgHookEnterTask: 4}

// link attaches the programs of a collection. The kernel waits a while in each; it waits for all at once.
func (t *Tracer) link(coll *ebpf.Collection, specs map[string]*ebpf.ProgramSpec) error {
	errs := make(chan error, len(specs))
	for name, spec := range specs {
		go func() {
			l, err := link.AttachTracing(link.TracingOptions{Program: coll.Programs[name]})
			if err != nil {
				errs <- loadError("attach to "+spec.AttachTo, err)
				return
			}
			t.mu.Lock()
			t.links[name] = l
			t.mu.Unlock()
			errs <- nil
		}()
	}
	var first error
	for range specs {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// Waiting returns the modules of rulesets that are not loaded; they are traced from when
// they are: see AttachModules.
func (t *Tracer) Waiting() []string { return t.waiting }

// AttachModules attaches the probes of the modules that have been loaded since the
// last call. It returns the names of those of Waiting that have been.
func (t *Tracer) AttachModules() ([]string, error) {
	var ready, rest []group
	for _, g := range t.pending {
		if moduleLoaded(g.module) {
			ready = append(ready, g)
		} else {
			rest = append(rest, g)
		}
	}
	var loaded, waiting []string
	for _, m := range t.waiting {
		if moduleLoaded(m) {
			loaded = append(loaded, m)
		} else {
			waiting = append(waiting, m)
		}
	}
	t.pending, t.waiting = rest, waiting
	if len(ready) == 0 {
		return loaded, nil
	}
	if err := t.setSymbols(); err != nil {
		return nil, err
	}
	return loaded, t.attach(ready)
}

// Read returns the next record. It waits until deadline at the most and then
// returns os.ErrDeadlineExceeded; the kernel does not wake the reader for each record.
// The bytes are valid until the next call.
func (t *Tracer) Read(deadline time.Time) ([]byte, error) {
	return t.ring.read(deadline)
}

// NewTable is a table that replaced another, or a new generation of a namespace's nf_tables.
type NewTable struct {
	NFT   uint32         // nf_tables: the generation (NFTA_GEN_ID)
	ID    events.TableID // xtables
	Netns uint32         // inode of the network namespace; xtables: that of the program that did it
	PF    uint8          // xtables: events.PFIPv4 …
	Name  string         // xtables
}

// ReadTable returns the next table that replaced another, as Read does a record. It may be
// called while another goroutine reads records.
func (t *Tracer) ReadTable(deadline time.Time) (NewTable, error) {
	for {
		raw, err := t.news.read(deadline)
		if err != nil {
			return NewTable{}, err
		}
		if uintptr(len(raw)) < unsafe.Sizeof(bpf.NftraceNewTable{}) {
			continue // no probe of ours wrote it
		}
		n := (*bpf.NftraceNewTable)(unsafe.Pointer(unsafe.SliceData(raw)))
		if n.Private == 0 {
			return NewTable{NFT: uint32(n.Gen), Netns: n.Netns}, nil
		}
		return NewTable{
			ID:    events.TableID{Private: n.Private, Gen: n.Gen},
			Netns: n.Netns, PF: uint8(n.Pf), Name: cString(n.Name[:]),
		}, nil
	}
}

func cString(s []int8) string {
	b := make([]byte, 0, len(s))
	for _, c := range s {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return string(b)
}

// Lookup runs read, which asks the kernel for one table's entries (from this
// process, with IPT_SO_GET_ENTRIES or IP6T_SO_GET_ENTRIES), and tells which
// generation of the table the kernel handed out. It must not be called while it runs.
func (t *Tracer) Lookup(read func() error) (events.TableID, error) {
	v := t.vars[bpf.NftraceVarLastLookup]
	if err := v.Set(bpf.NftraceLookup{}); err != nil {
		return events.TableID{}, err
	}
	if err := read(); err != nil {
		return events.TableID{}, err
	}
	var l bpf.NftraceLookup
	if err := v.Get(&l); err != nil {
		return events.TableID{}, err
	}
	return events.TableID{Private: l.Private, Gen: l.Gen}, nil
}

// Losses are counts of what was not recorded, by cause.
type Losses struct {
	RingBuffer uint64 // records: the buffer was full
	Journeys   uint64 // packets: too many under way at once
	Frames     uint64 // calls of hooks: too many open at once on a CPU
	Probes     uint64 // hits of probes that the kernel skipped (recursion), but of those that are there more than once
}

// Total is the sum over all causes but Probes: those may have been hits of packets that
// nobody follows.
func (l Losses) Total() uint64 { return l.RingBuffer + l.Journeys + l.Frames }

// Losses reads the counters.
func (t *Tracer) Losses() (Losses, error) {
	var l Losses
	for cause, field := range map[bpf.NftraceLoss]*uint64{
		bpf.NftraceLossLOSS_RINGBUF:  &l.RingBuffer,
		bpf.NftraceLossLOSS_JOURNEYS: &l.Journeys,
		bpf.NftraceLossLOSS_FRAMES:   &l.Frames,
	} {
		var perCPU []uint64
		if err := t.maps[bpf.NftraceMapLosses].Lookup(uint32(cause), &perCPU); err != nil {
			return l, fmt.Errorf("read the loss counters: %w", err)
		}
		for _, n := range perCPU {
			*field += n
		}
	}
	for _, c := range t.colls {
		for name, p := range c.Programs {
			// Of copies one is enough.
			if strings.HasPrefix(name, bpf.NftraceProgHookEnter) && tasksPreempt() {
				continue
			}
			stats, err := p.Stats()
			if err != nil {
				return l, fmt.Errorf("read the counts of skipped probes: %w", err)
			}
			l.Probes += stats.RecursionMisses
		}
	}
	return l, nil
}

// Live is the number of packets that are followed at this moment.
func (t *Tracer) Live() (uint64, error) {
	var n uint64
	err := t.vars[bpf.NftraceVarLive].Get(&n)
	return n, err
}

// Stop begins no more journeys; those under way go on. It may be called while another
// goroutine reads. The probes stay: one that went first would leave holes in what the
// others still tell.
func (t *Tracer) Stop() error { return t.vars[bpf.NftraceVarTracing].Set(uint64(0)) }

// Close detaches everything. Nothing is left in the kernel.
func (t *Tracer) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var err error
	// The kernel waits a while in each; let it wait for all at once.
	errs := make(chan error, len(t.links))
	for _, l := range t.links {
		go func() { errs <- l.Close() }()
	}
	for range t.links {
		err = errors.Join(err, <-errs)
	}
	clear(t.links)
	if t.key != nil {
		err = errors.Join(err, t.key.Close())
	}
	for _, r := range []*ring{t.ring, t.news} {
		if r != nil {
			err = errors.Join(err, r.close())
		}
	}
	for _, c := range t.colls {
		c.Close()
	}
	t.colls = nil
	return err
}

// loadError says what the kernel refused, with the cure where it is known.
func loadError(doing string, err error) error {
	var ve *ebpf.VerifierError
	switch {
	case errors.As(err, &ve):
		return &VerifierError{doing: doing, err: ve}
	case errors.Is(err, unix.E2BIG):
		return fmt.Errorf("%s: too many tracers are attached there (a function can have 38 probes); end other nftraces", doing)
	case errors.Is(err, os.ErrPermission):
		if mode := lockdownMode(lockdownPath); mode == "confidentiality" {
			return fmt.Errorf("%s: the kernel is locked down (confidentiality), which forbids tracing; boot without lockdown=confidentiality", doing)
		}
		return fmt.Errorf("%s: not permitted; run nftrace as root (CAP_BPF and CAP_PERFMON are not enough to read rulesets): %w", doing, err)
	default:
		return fmt.Errorf("%s: %w", doing, err)
	}
}

// VerifierError is the kernel's refusal of a probe. Log holds all that it said.
type VerifierError struct {
	doing string
	err   *ebpf.VerifierError
}

func (e *VerifierError) Error() string {
	return fmt.Sprintf("%s: the kernel's verifier refused it: %v (kernel %s; please report it with the output of nftrace -v)",
		e.doing, e.err.Cause, kernelRelease())
}

func (e *VerifierError) Unwrap() error { return e.err }

// Log is the verifier's log.
func (e *VerifierError) Log() string { return strings.Join(e.err.Log, "\n") }
