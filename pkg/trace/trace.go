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
	// MaxRules is the number of rules, policies included, of the largest table
	// for which room is made; 0 means 1,024.
	MaxRules int
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
	// spare probes do what others could not; there may be more of them.
	spare bool
}

var groups = []group{
	{module: "x_tables", programs: []string{bpf.NftraceProgTableFree, bpf.NftraceProgTableLookup}},
	{module: "ip_tables", programs: []string{
		bpf.NftraceProgIptTaskExit, bpf.NftraceProgIptBhExit, bpf.NftraceProgIptTaskEnter, bpf.NftraceProgIptBhEnter,
	}},
	{module: "ip6_tables", programs: []string{
		bpf.NftraceProgIp6tTaskExit, bpf.NftraceProgIp6tBhExit, bpf.NftraceProgIp6tTaskEnter, bpf.NftraceProgIp6tBhEnter,
	}},
	{module: "ip_tables", programs: []string{bpf.NftraceProgIptSpareExit, bpf.NftraceProgIptSpareEnter}, present: tasksPreempt, spare: true},
	{module: "ip6_tables", programs: []string{bpf.NftraceProgIp6tSpareExit, bpf.NftraceProgIp6tSpareEnter}, present: tasksPreempt, spare: true},
	{module: "bridge", programs: []string{bpf.NftraceProgBrForward}},
	{module: "nf_nat", programs: []string{bpf.NftraceProgNatExit, bpf.NftraceProgNatEnter}},
	{programs: []string{bpf.NftraceProgDeliverIp6}, present: hasIPv6},
	{programs: []string{
		bpf.NftraceProgSkbFree, bpf.NftraceProgSkbRelease, bpf.NftraceProgSkbMorph,
		bpf.NftraceProgDevXmit, bpf.NftraceProgDeliverIp,
		bpf.NftraceProgHookExit, bpf.NftraceProgHookEnter,
	}},
}

// Tracer is a set of attached probes. Its methods, but for Close and Stop, are to be
// called from one goroutine.
type Tracer struct {
	spec *ebpf.CollectionSpec
	maps map[string]*ebpf.Map
	vars map[string]*ebpf.Variable
	ring *ring

	// undisturbed is set where probes of tasks are not preempted (bpf_preempt_disable).
	undisturbed bool

	mu      sync.Mutex
	colls   []*ebpf.Collection
	links   map[string]link.Link // by program
	pending []group              // of modules that are not loaded
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
		return nil, err
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
	blocks := (uint32(maxRules) + block - 1) / block

	const perCPU = 2 // families
	const runs = uint32(len(bpf.NftraceRuns{}.R))
	spec.Maps[bpf.NftraceMapXtRuns].MaxEntries = uint32(cpus) * perCPU
	spec.Maps[bpf.NftraceMapXtSnap].MaxEntries = uint32(cpus) * perCPU * runs * blocks
	if o.BufferBytes != 0 {
		spec.Maps[bpf.NftraceMapRecords].MaxEntries = uint32(o.BufferBytes)
	}

	for name, value := range map[string]any{
		bpf.NftraceVarNrCpus:     uint32(cpus),
		bpf.NftraceVarSnapBlocks: blocks,
		bpf.NftraceVarSelfTgid:   uint32(os.Getpid()),
		bpf.NftraceVarUsePlaces:  len(o.Netns)+len(o.Ifaces)+len(o.Addrs) > 0,
		bpf.NftraceVarUseNetns:   len(o.Netns) > 0,
		bpf.NftraceVarUseIfaces:  len(o.Ifaces) > 0,
		bpf.NftraceVarUseAddrs:   len(o.Addrs) > 0,
		bpf.NftraceVarUseExpr:    len(o.Filter) > 0,
		bpf.NftraceVarUseNat:     looksAtEndpoints(o.Filter),
		bpf.NftraceVarUseMac:     looksAtMAC(o.Filter),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
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
	if err := t.setSymbols(); err != nil {
		return err
	}
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
	return t.attach(ready)
}

// attach loads and attaches the probes of some groups, in their order. They are loaded
// together, because reading the kernel's type information takes most of the time.
func (t *Tracer) attach(gs []group) error {
	sub := &ebpf.CollectionSpec{
		Maps: t.spec.Maps, Variables: t.spec.Variables,
		Types: t.spec.Types, ByteOrder: t.spec.ByteOrder,
		Programs: map[string]*ebpf.ProgramSpec{},
	}
	var programs []string
	for _, g := range gs {
		for _, name := range g.programs {
			p := t.spec.Programs[name]
			for i := range t.copies(g) {
				more := fmt.Sprintf("%s_%d", name, i+1)
				sub.Programs[more] = p.Copy()
				programs = append(programs, more)
			}
			sub.Programs[name] = p
			programs = append(programs, name)
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(sub, ebpf.CollectionOptions{MapReplacements: t.maps})
	if err != nil {
		return loadError("load the probes", err)
	}
	t.colls = append(t.colls, coll)
	// The probe that begins journeys comes last, when all others can see them.
	first := slices.DeleteFunc(slices.Clone(programs), func(name string) bool { return name == bpf.NftraceProgHookEnter })
	if err := t.link(coll, sub.Programs, first); err != nil {
		return err
	}
	if err := t.switchOn(gs); err != nil {
		return err
	}
	if len(first) == len(programs) {
		return nil
	}
	return t.link(coll, sub.Programs, []string{bpf.NftraceProgHookEnter})
}

// switchOn lets the probes of tables work, now that all of them are attached.
func (t *Tracer) switchOn(gs []group) error {
	v := t.vars[bpf.NftraceVarXtOn]
	var on [2]uint32
	if err := v.Get(&on); err != nil {
		return err
	}
	for _, g := range gs {
		switch g.module {
		case "ip_tables":
			on[0] = 1
		case "ip6_tables":
			on[1] = 1
		}
	}
	return v.Set(on)
}

// copies is how many more of a group's probes are attached. A task that is preempted at
// the end of a probe keeps the kernel from running that one again, so one CPU with many
// tasks wants more. They share their working space, which only probes that are not
// preempted within may do.
func (t *Tracer) copies(g group) int {
	if g.spare && t.undisturbed {
		return 2
	}
	return 0
}

// link attaches programs. The kernel waits a while in each; it waits for all at once.
func (t *Tracer) link(coll *ebpf.Collection, specs map[string]*ebpf.ProgramSpec, programs []string) error {
	errs := make(chan error, len(programs))
	for _, name := range programs {
		go func() {
			l, err := link.AttachTracing(link.TracingOptions{Program: coll.Programs[name]})
			if err != nil {
				errs <- loadError("attach to "+specs[name].AttachTo, err)
				return
			}
			t.mu.Lock()
			t.links[name] = l
			t.mu.Unlock()
			errs <- nil
		}()
	}
	var first error
	for range programs {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// Waiting returns the modules that are not loaded and whose probes wait for them.
func (t *Tracer) Waiting() []string {
	var names []string
	for _, g := range t.pending {
		if !slices.Contains(names, g.module) {
			names = append(names, g.module)
		}
	}
	return names
}

// AttachModules attaches the probes of the modules that have been loaded since the
// last call, and returns their names.
func (t *Tracer) AttachModules() ([]string, error) {
	var loaded []string
	var ready, rest []group
	for _, g := range t.pending {
		if !moduleLoaded(g.module) {
			rest = append(rest, g)
			continue
		}
		ready = append(ready, g)
		if !slices.Contains(loaded, g.module) {
			loaded = append(loaded, g.module)
		}
	}
	if len(ready) == 0 {
		return nil, nil
	}
	t.pending = rest
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

// Lookup runs read, which asks the kernel for one table's entries (from this
// process, with IPT_SO_GET_ENTRIES or IP6T_SO_GET_ENTRIES), and tells which
// generation of the table the kernel handed out.
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
	Runs       uint64 // runs of tables: too many open at once on a CPU
	ExitMissed uint64 // runs whose exit probe was skipped by the kernel
	Probes     uint64 // hits of any probe that the kernel skipped (recursion)
}

// Total is the sum over all causes but Probes: of those, what matters to a packet is in
// ExitMissed, or makes a step unresolved.
func (l Losses) Total() uint64 {
	return l.RingBuffer + l.Journeys + l.Runs + l.ExitMissed
}

// Losses reads the counters.
func (t *Tracer) Losses() (Losses, error) {
	var l Losses
	for cause, field := range map[bpf.NftraceLoss]*uint64{
		bpf.NftraceLossLOSS_RINGBUF:     &l.RingBuffer,
		bpf.NftraceLossLOSS_JOURNEYS:    &l.Journeys,
		bpf.NftraceLossLOSS_SLOTS:       &l.Runs,
		bpf.NftraceLossLOSS_EXIT_MISSED: &l.ExitMissed,
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
		for _, p := range c.Programs {
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
// goroutine reads.
func (t *Tracer) Stop() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.links[bpf.NftraceProgHookEnter]
	if l == nil {
		return nil
	}
	delete(t.links, bpf.NftraceProgHookEnter)
	return l.Close()
}

// Close detaches everything. Nothing is left in the kernel.
func (t *Tracer) Close() error {
	err := t.Stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	// The kernel waits a while in each; let it wait for all at once.
	errs := make(chan error, len(t.links))
	for _, l := range t.links {
		go func() { errs <- l.Close() }()
	}
	for range t.links {
		err = errors.Join(err, <-errs)
	}
	clear(t.links)
	if t.ring != nil {
		err = errors.Join(err, t.ring.close())
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
