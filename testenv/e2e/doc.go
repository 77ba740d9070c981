// Package e2e holds the end-to-end tests: real traffic through real rules in a
// VM, against the kernel's own trace and against what nftrace says.
//
// A case is one txtar file in testdata. Its comment says what it is about; its
// sections are
//
//	-- topology --      a name of testenv/topo
//	-- rules NS PROG -- rules added to namespace NS: input for PROG-restore
//	                    --noflush (iptables-legacy, ip6tables-nft, …), for nft -f,
//	                    or, where PROG is sh, shell lines
//	-- setup --         shell lines before anything is traced
//	-- run --           shell lines: the traffic
//	-- args --          arguments of nftrace, separated by white space
//	-- oracle --        namespaces whose packets the kernel traces; h if there is
//	                    no such section, none if it is empty
//	-- trace --         the paths that are expected
//	-- not on 5.10 --   why the case is left out there
//	-- output --        lines, or parts of lines, that nftrace prints, in this order
//
// In shell lines, `on NS command…` runs a command in a namespace, and
// `serve NS command…` starts a server of testenv/cmd/traffic there and goes on
// once it is ready. The lines end when all that they started has ended.
//
// A path in -- trace -- is a line with the number of packets (or + for one or
// more) and the fields by which to know them in the packet's first TRACE line,
// followed by indented lines with table:chain:type:number in the notation of
// the scenarios, separated by blanks or commas. The paths are matched from top
// to bottom, each against the packets that those before have left; in the end
// no packet may be left.
//
// The cases of testdata/truth are rulesets: TestTruth loads them into namespace h of
// topology bare, sends a mixture of traffic and holds every line of nftrace against
// the kernel's. Their sections are
//
//	-- v4 --, -- v6 -- input of iptables-restore and ip6tables-restore; tables and
//	                   policies that are not there are empty and ACCEPT; a line
//	                   "@300 TEXT" stands for 300, with %d the number
//	-- traffic --      a script of testenv/cmd/traffic, behind the mixture
//	-- alone --        without the mixture
//	-- fresh --        in a topology of its own, with the tables that are there only
//	-- args --         arguments of nftrace
//	-- unresolved --   for what cause runs of tables may be unresolved; there must be some
//	-- own --          why the case needs an nftrace that sees nothing else; the others of
//	                   a test share one, for to start it takes longer than to compare
//
// The cases of testdata/arp are rulesets of arptables, legacy and nft. The kernel traces none of ARP:
// TestTruthARP holds how often nftrace names each rule against the rules' own counters, which it
// reads behind each line of the traffic, and the order against what the rules allow. Sections:
//
//	-- rules --        arguments of arptables, a command a line, with "@300 TEXT" as above
//	-- traffic --      a script of testenv/cmd/traffic, behind the mixture; a line sends packets of one kind
//	-- hits --         rules that packets must meet, as "CHAIN NUMBER…"; a NUMBER may be policy
//	-- legacy --       arptables-nft does not know all of it
//	-- own --          why the case needs an nftrace of its own, which is started behind its rules
//
// The rulesets of ebtables-legacy stand in eb_test.go, for each rule gets a watcher that logs it:
// TestTruthEB holds what nftrace names of each packet against that log.
//
// The rulesets of testdata/truth, by way of iptables-nft, and those of testdata/nft go through
// nf_tables: TestTruthNFT holds every line of nftrace against what the kernel tells of them by netlink.
// Besides traffic, alone, args, unresolved and own, the sections of testdata/nft are
//
//	-- nft --          input of nft -f, with "@300 TEXT" as above
//	-- hits --         lines that packets must meet, so that a dead ruleset shows, as
//	                   "FAMILY TABLE CHAIN NUMBER…"; a NUMBER may be policy or end
//	-- families --     families besides inet (bridge, arp, netdev) that the oracle traces from
//	                   their first hooks on
//	-- not on 6.1 --   why the case is left out there
//
// TestInterleaved (make test-interleave) holds rules against ports, where packets
// meet in one table, TestInterleavedNAT where they meet in NAT.
//
// nftrace runs around the traffic if there is one in PATH; unless args choose
// another --format, its trace lines must be the kernel's. Where NFTRACE_IN_VM
// is not 1, that is outside of a VM, the cases are parsed and skipped. NFTRACE_BACKEND=kprobe
// has all tests run nftrace with --backend kprobe, NFTRACE_NO_BTF=x_tables,bridge takes the type
// information from modules before they are loaded.
package e2e
